"""Copies onto a host's module what changed in its replacement: device, dtype, train/eval mode, requires_grad.

Only what has changed since the patch is taken over: a host that was partly frozen, or of several dtypes, comes back as it was.
Tensors and modules that both have (output projection, norms, gate, position bias) follow each their own counterpart; the others,
which stand for the same projections in another form, follow the replacement's.
"""

from collections.abc import Collection, Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from vit_tucker.errors import PatchError

PLACES = ("position_bias.source.", "rel_pos.")
"""Where a replacement and some hosts have the position bias; the other hosts have it in the attention module itself."""


def refuse_lost(name: str, original: nn.Module, current: nn.Module) -> None:
    """Raises PatchError if a host's module has no values to go where its replacement has some.

    Args:
        name: full name of the module.
        original: the host's.
        current: what stands in its place.
    """
    if any(p.is_meta for p in original.parameters()) and not any(p.is_meta for p in current.parameters()):
        raise PatchError(
            f"{name}: the original module is on the meta device and has no values, its replacement has; load the model again"
        )


def follow(pairs: Collection[tuple[nn.Module, nn.Module]]) -> None:
    """Copies device, dtype, mode and requires_grad of a replacement to the host's modules, in place.

    Args:
        pairs: each module of the host with its replacement; they may share tensors with each other.
    """
    trains = [part for pair in pairs for part in _requires_grad(*pair)]
    dtypes = [part for pair in pairs for part in _dtypes(*pair)]
    for parameter, flag in trains:
        parameter.requires_grad_(flag)
    for tensor, dtype in dtypes:
        grad, tensor.grad = tensor.grad, None  # which must have the dtype of its tensor
        tensor.data = tensor.data.to(dtype)
        tensor.grad = None if grad is None else grad.to(dtype)
    for original, current in pairs:
        device = next((tensor.device for tensor in _tensors(current).values()), None)
        if device is not None:
            original.to(device)
        _follow_modes(original, current)


def _follow_modes(original: nn.Module, current: nn.Module) -> None:
    modes = {name: module.training for name, module in current.named_modules()}
    if set(modes.values()) != {original.training}:
        for name, module in original.named_modules():
            module.training = modes.get(name, current.training)


def _requires_grad(original: nn.Module, current: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """Returns the flags to set: one for the whole layer is what ``patch`` has set, others are the user's."""
    own, now = dict(original.named_parameters()), {_tail(name): p for name, p in current.named_parameters()}
    if not now or {p.requires_grad for p in now.values()} == {any(p.requires_grad for p in own.values())}:
        return
    theirs = [p for name, p in now.items() if name not in map(_tail, own)] or list(now.values())
    for name, parameter in own.items():
        like = now.get(_tail(name))
        kind = [p for p in theirs if (p.ndim < 2) == (parameter.ndim < 2)] if like is None else [like]
        yield parameter, any(p.requires_grad for p in kind or theirs)


def _dtypes(original: nn.Module, current: nn.Module) -> Iterator[tuple[Tensor, torch.dtype]]:
    """Returns the tensors to cast: the dtype of the host's projections is what ``patch`` has set, another is the user's."""
    own, now = _tensors(original), {_tail(name): tensor for name, tensor in _tensors(current).items()}
    shared = {_tail(name) for name in own} & now.keys()
    before, after = _projection_dtype(own, shared), _projection_dtype(now, shared)
    for name, tensor in own.items():
        like = now.get(_tail(name))
        dtype = after if like is None else like.dtype
        if dtype is not None and dtype not in (before, tensor.dtype):
            yield tensor, dtype


def _projection_dtype(tensors: dict[str, Tensor], shared: set[str]) -> torch.dtype | None:
    """Returns the dtype of the first matrix that only one of the two modules has; of the first at all if there is none."""
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.ndim > 1}
    own = [tensor for name, tensor in matrices.items() if _tail(name) not in shared]
    return next((tensor.dtype for tensor in [*own, *matrices.values()]), None)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and buffers of floating point, by name."""
    named = chain(module.named_parameters(), module.named_buffers())
    return {name: tensor for name, tensor in named if tensor.is_floating_point()}


def _tail(name: str) -> str:
    """Returns the name of a tensor or module without the place of the position bias."""
    for place in PLACES:
        name = name.removeprefix(place)
    return name
