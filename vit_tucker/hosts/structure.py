"""A model's structure without values, on the meta device."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vit_tucker.attention.effective import CALL_HOOKS, HOOKS
from vit_tucker.attention.parametrized import functional_hooks
from vit_tucker.errors import ConfigError


class ReadableLinspace(TorchFunctionMode):
    """Makes ``torch.linspace`` work within a meta device: older timm reads drop path rates from it with ``item()``."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls the function, on the CPU if it is ``torch.linspace``."""
        options = {"device": "cpu"} if func is torch.linspace else {}
        return func(*args, **(kwargs or {}) | options)


def on_meta(create: Callable[[], nn.Module]) -> nn.Module:
    """Runs a constructor on the meta device; raises whatever it raises where it computes with values."""
    with torch.device("meta"), ReadableLinspace():
        return create()


def without_weights(create: Callable[[], nn.Module]) -> nn.Module:
    """Runs a constructor on the meta device; on the CPU where it computes with values.

    Args:
        create: makes a model, without pretrained weights.
    """
    try:
        return on_meta(create)
    except (RuntimeError, NotImplementedError, TypeError, ConfigError):
        return create()


@contextmanager
def without_global_hooks() -> Iterator[None]:
    """Switches off torch's hooks for all modules (``register_module_forward_hook`` and the like)."""
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
    """Copies a model's structure, with parameters and buffers without values, and without hooks, which need values.

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
