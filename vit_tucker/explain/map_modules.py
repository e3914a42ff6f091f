"""Finds the modules that an attention layer's maps pass through, the form of the maps, and checks that they are maps."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.attention.module import AttentionModule
from vit_tucker.errors import ExplainError, PatchError
from vit_tucker.hosts.families import read_host
from vit_tucker.patching.selection import Selection, select

MapModule = tuple[nn.Module, nn.Module]
"""An attention layer, and the module inside it that sees the map: its dropout before, else its softmax after."""


def choose_map_modules(found: dict[str, nn.Module], layers: Selection | None) -> dict[str, MapModule]:
    """Returns the layers to record, with the places where their maps show.

    Raises:
        ExplainError: none shows its maps, or a chosen one does not.
    """
    if not found:
        raise ExplainError("the model has no attention layer that vit_tucker knows")
    places = {name: map_module_of(found[name]) for name in select(layers, list(found))}
    blind = [name for name, place in places.items() if place is None]
    if blind and (layers is not None or len(blind) == len(places)):
        kind = type(found[blind[0]]).__name__
        raise ExplainError(f"{blind[0]}: {kind} has neither attn_drop nor softmax, where its maps would show")
    return {name: (found[name], place) for name, place in places.items() if place is not None}


def map_module_of(module: nn.Module) -> nn.Module | None:
    """Returns where a layer's map passes through a module; None if nowhere."""
    places = (getattr(module, name, None) for name in ("attn_drop", "softmax"))
    return next((place for place in places if isinstance(place, nn.Module)), None)


@contextlib.contextmanager
def unfused(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Makes attention layers use plain products instead of fused kernels; their switches are restored afterwards."""
    switches: dict[Any, bool] = {m: m.fused_attn for m in modules if hasattr(m, "fused_attn")}  # type: ignore[misc]
    try:
        for module in switches:
            module.fused_attn = False
        yield
    finally:
        for module, switch in switches.items():
            module.fused_attn = switch


def heads_apart(attn: Tensor, module: Any) -> Tensor:
    """Returns a map as (B * S, H, n, n); NesT forms (B, H, S, n, n), SAM (B * S * H, n, n)."""
    if attn.ndim == 5:
        return attn.transpose(1, 2).flatten(0, 1)
    return attn.unflatten(0, (-1, module.num_heads)) if attn.ndim == 3 else attn


def layout_of(module: nn.Module) -> str:
    """Returns the layout of the layer's input, see ``HostSpec``."""
    if isinstance(module, AttentionModule):
        return module.spec.layout
    try:
        return read_host(module, plain=False).spec.layout
    except (PatchError, AttributeError):  # quantised projections have no weight to look at
        return "sequence"


def check_rows(name: str, attn: Tensor) -> None:
    """Raises ExplainError unless every row of a map is a distribution, or zeros where a query may attend to nothing.

    A softmax row of N numbers is off by the rounding of its sum, at most N units, and of its own divisions.

    Args:
        name: of the layer, for the message.
        attn: (S, H, n, n).
    """
    tolerance = torch.finfo(attn.dtype).eps * (attn.shape[-1] + 4)
    sums = attn.sum(-1, dtype=torch.float64)
    error = (sums - 1).abs().where(sums != 0, sums).max().item()
    if not error <= tolerance or attn.min() < 0:
        raise ExplainError(
            f"{name}: rows of its map don't sum to 1 (off by {error:.2g}): no softmax is the last step before its values"
        )
