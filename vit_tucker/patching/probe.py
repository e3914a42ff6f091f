"""Models without memory or arithmetic, on the meta device: their structure, and how many tokens each attention layer sees."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vit_tucker.attention.call import to_sequences
from vit_tucker.attention.effective import CALL_HOOKS, HOOKS, functional_hooks
from vit_tucker.errors import ConfigError


class ReadableLinspace(TorchFunctionMode):
    """``torch.linspace`` on the CPU within a meta device: older timm takes drop path rates out of it with ``item()``."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See torch."""
        options = {"device": "cpu"} if func is torch.linspace else {}
        return func(*args, **(kwargs or {}) | options)


def on_meta(create: Callable[[], nn.Module]) -> nn.Module:
    """What a function creates, on the meta device; whatever it raises where its constructor computes with values."""
    with torch.device("meta"), ReadableLinspace():
        return create()


def without_weights(create: Callable[[], nn.Module]) -> nn.Module:
    """What a function creates, on the meta device; on the CPU where a constructor computes with values.

    Args:
        create: makes a model, without pretrained weights.
    """
    try:
        return on_meta(create)
    except (RuntimeError, NotImplementedError, TypeError, ConfigError):
        return create()


@contextmanager
def without_global_hooks() -> Iterator[None]:
    """No hooks of torch's for all modules (``register_module_forward_hook`` and the like) in here."""
    tables = [vars(nn.modules.module).get(f"_global{kind}") for kind in CALL_HOOKS]
    kept = [(table, dict(table)) for table in tables if table]
    for table, _ in kept:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in kept:
            table.update(hooks)


def structure_copy(model: nn.Module, device: str = "meta", shared: Iterable[object] = ()) -> nn.Module:
    """The model's structure, with parameters and buffers that hold no values; the model itself is not touched. Hooks of the model
    are left out: they are a user's, and made for values.

    Args:
        model: any.
        device: of the copy.
        shared: objects inside the model that the copy shares with it instead of having a copy.
    """
    memo: dict[int, Any] = {id(part): part for part in shared}
    for module in model.modules():
        memo |= {id(value): OrderedDict() for name, value in vars(module).items() if name in HOOKS}
        for value in vars(module).values():
            if isinstance(value, Tensor) and (
                not value.is_leaf or functional_hooks(module)
            ):  # old weight norms keep one
                memo[id(value)] = torch.empty_like(value, device=device, requires_grad=False)
    for tensor in chain(model.parameters(), model.buffers()):
        empty = torch.empty_like(tensor, device=device, requires_grad=False)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def input_shape(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> tuple[int, int, int]:
    """Channels, height and width of the model's input: from ``img_size``, its stem, or its pretrained_cfg."""
    embed: Any = getattr(model, "patch_embed", None)
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    channels, *sizes = config.get("input_size", (3, 224, 224))
    size = img_size or getattr(embed, "img_size", None) or tuple(sizes)
    height, width = (size, size) if isinstance(size, int) else size
    return input_channels(model) or channels, height, width


def input_channels(model: nn.Module) -> int | None:
    """Channels that the model's first convolution takes: the one pretrained_cfg names, else the first there is; None if the
    images go through something else first."""
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    modules = dict(model.named_modules())
    if "first_conv" in config:
        names = config["first_conv"] or ()
        stem = [modules.get(name) for name in ([names] if isinstance(names, str) else names)]
    else:
        stem = list(modules.values())
    return next((module.in_channels for module in stem if isinstance(module, nn.Conv2d)), None)


def count_tokens(
    model: nn.Module, layouts: Mapping[str, str], img_size: int | tuple[int, int] | None = None
) -> dict[str, tuple[int, int]]:
    """Sequences per image and tokens per sequence that each named module receives.

    Args:
        model: any model that maps (B, 3, H, W) images; it is not touched.
        layouts: of the tokens that each module takes, see ``HostSpec``, by full module name.
        img_size: pixels; the model's own size if None.

    Returns:
        name -> (sequences, tokens); empty if the model can't run on the meta device.
    """
    try:
        probe = structure_copy(model).eval()
        seen: dict[str, tuple[int, int]] = {}

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                sequences, tokens, _ = to_sequences(args[0] if args else kwargs["x"], layouts[name]).shape
                seen[name] = (sequences, tokens)

            return hook

        for name in layouts:
            probe.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        with torch.no_grad(), without_global_hooks():
            probe(torch.empty(1, *input_shape(model, img_size), device="meta", dtype=dtype))
    except Exception:
        return {}
    return seen
