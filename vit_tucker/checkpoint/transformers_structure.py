"""Builds models of transformers from their config without memory for parameters, and fills them with stored tensors."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from vit_tucker.checkpoint.entry import install, read_patch
from vit_tucker.errors import CheckpointError, and_more, nearest, reason_of
from vit_tucker.hosts.slot import SLOTS
from vit_tucker.hosts.transformers_library import import_transformers, quiet_transformers


def build_structure(
    kind: str,
    class_name: str,
    values: Mapping[str, Any],
    attention: str | None,
    patches: Mapping[str, Mapping[str, Any]],
) -> nn.Module:
    """Builds a model of transformers, patched or dense: parameters on the meta device, buffers with their values.

    Args:
        kind: transformers' ``model_type``.
        class_name: of the model, one that transformers exports.
        values: of its config.
        attention: name of transformers' attention implementation; its choice if None.
        patches: config of the patch of each slot, as ``patch_values`` returns it; empty for a dense model.

    Raises:
        CheckpointError: transformers is missing, or does not have such a model. PatchError: a patch doesn't fit.
    """
    transformers = import_transformers(class_name, CheckpointError)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = getattr(transformers, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)) or kind not in CONFIG_MAPPING:
        known = [name for name in dir(transformers) if name.endswith("ForCausalLM")]
        version = transformers.__version__
        raise CheckpointError(
            f"transformers {version} has no model '{class_name}' ({kind}){nearest(class_name, known)}"
        )
    decode = getattr(transformers.PreTrainedConfig, "_decode_special_floats", dict)
    try:
        with quiet_transformers(progress=False):
            config = CONFIG_MAPPING[kind].from_dict(decode(dict(values)))
            if attention is not None:
                config._attn_implementation = attention
            with init_empty_weights(include_buffers=False):
                model: Any = cls(config)
            model.tie_weights()  # again, since empty weights are never shared
    except Exception as error:  # configs and constructors of transformers raise many kinds
        raise CheckpointError(f"{class_name} can't be built: {reason_of(error)}") from None
    for name, patch in patches.items():
        install(model, read_patch(patch, SLOTS[name]))
    return model


def tied_names(model: nn.Module) -> dict[str, str]:
    """Returns the names of parameters that are another's, each with the first name of that."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            found[name] = owner
    return found


def untied_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns a model's state dict with each tied parameter once, under its first name."""
    tied = tied_names(model)
    return {name: value.detach() for name, value in model.state_dict().items() if name not in tied}


def fill_structure(model: nn.Module, state: dict[str, Tensor], origin: str, dtype: torch.dtype | None = None) -> None:
    """Makes stored tensors the parameters and buffers of a model that was built without; tied ones are tied again.

    Args:
        model: of ``build_structure``.
        state: the stored tensors by name, each tied one at least once.
        origin: what to call them.
        dtype: of all that is floating-point; the stored ones if None.

    Raises:
        CheckpointError: names or shapes are not exactly the model's.
    """
    tied = tied_names(model)
    given = {tied.get(name, name): value for name, value in state.items()}
    own = {name: value for name, value in model.state_dict().items() if name not in tied}
    refuse_names(f"{origin}: of another model or patch: no", (name for name in own if name not in given))
    refuse_names(
        f"{origin}: of another model or patch: without a place in it:", (name for name in given if name not in own)
    )
    for name, value in given.items():
        if value.shape != own[name].shape:
            shapes = f"{tuple(value.shape)}, not {tuple(own[name].shape)}"
            raise CheckpointError(f"{origin}: of another model or patch: {name} is {shapes}")
        if value.is_floating_point() != own[name].is_floating_point():
            raise CheckpointError(
                f"{origin}: {name} is {str(value.dtype).removeprefix('torch.')}: a quantised checkpoint"
            )
    if dtype is not None:
        given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
    model.load_state_dict(given, strict=False, assign=True)
    for name, owner in tied.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, model.get_parameter(owner))


def refuse_names(what: str, names: Iterable[str]) -> None:
    """Raises CheckpointError with the first of some names, if there are any."""
    if found := list(names):
        raise CheckpointError(f"{what} {found[0]}{and_more(found)}")
