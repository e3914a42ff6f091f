"""Compares how two models are built: modules, tensors and plain values, without looking at weights."""

from collections.abc import Iterator
from typing import Any

from torch import nn

IGNORED = {
    *("training", "fused_attn", "backend", "inplace"),  # how something is run
    *("grad_checkpointing", "gradient_checkpointing"),
    "name_or_path",  # where transformers found a model
    *("p", "drop_prob", "drop_rate", "drop_path_rate"),  # training only: timm's hub configs don't hold them either
    *("img_size", "input_size", "default_cfg", "pretrained_cfg", "name"),
}
"""Attributes that may differ between models that compute the same."""
TRAINING_ONLY = {"Dropout", "DropPath", "Identity", "PatchDropout"}
"""Classes of modules that do nothing in evaluation: timm puts one in place of another by their rates."""


def differences(model: nn.Module, other: nn.Module) -> Iterator[str]:
    """Yields what differs between two models, most telling first: module classes, then shapes, then plain values.

    Args:
        model: as it is.
        other: as it would be rebuilt.

    Yields:
        Lines 'blocks.0.attn.num_heads is 6, not 3', with what ``model`` has first.
    """
    mine, others = dict(model.named_modules()), dict(other.named_modules())
    for name, module in mine.items():
        found = others.get(name)
        if type(found) is not type(module) and not {_name(module), _name(found)} <= TRAINING_ONLY:
            yield f"{name or 'the model'} is a {_name(module)}, not {'there at all' if found is None else f'a {_name(found)}'}"
    for name in others.keys() - mine.keys():
        yield f"{name} is missing"
    state, rebuilt = model.state_dict(), other.state_dict()
    for name in dict.fromkeys([*state, *rebuilt]):
        shapes = [tuple(tensors[name].shape) if name in tensors else "missing" for tensors in (state, rebuilt)]
        if shapes[0] != shapes[1]:
            yield f"{name} is {shapes[0]}, not {shapes[1]}"
    for name, module in mine.items():
        theirs = _plain(others[name]) if name in others else {}
        for key, value in _plain(module).items():
            if key in theirs and theirs[key] != value:
                yield f"{name}{'.' if name else ''}{key} is {value}, not {theirs[key]}"


def _name(module: nn.Module | None) -> str:
    return type(module).__name__


def _plain(module: nn.Module) -> dict[str, Any]:
    """Returns the attributes of a module that are numbers, strings or tuples of these, and public."""
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in IGNORED and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
