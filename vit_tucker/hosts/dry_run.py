"""Runs a model's structure on the meta device, to find the shapes that its layers receive and the image sizes that it accepts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def dry_run(structure: nn.Module, shape: tuple[int, int, int]) -> None:
    """Runs a model without values, see ``structure_copy``, on one image of channels, height and width."""
    dtype = next((p.dtype for p in structure.parameters() if p.is_floating_point()), torch.float32)
    with torch.no_grad(), ShapesAlone():
        structure.eval()(torch.empty(1, *shape, device="meta", dtype=dtype))


class ShapesAlone(TorchFunctionMode):
    """Answers the commonest functions of a ViT on the meta device by their shape.

    torch decomposes them in Python, which takes several times as long as all the rest of a forward.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls the function, or returns a tensor of its result's shape and dtype."""
        return SHAPES.get(func, func)(*args, **(kwargs or {}))


def _normalised(input: Tensor, normalized_shape: Sequence[int], *_: Any, **__: Any) -> Tensor:
    width = len(normalized_shape)
    if tuple(input.shape[-width:]) != tuple(normalized_shape):
        raise RuntimeError(f"layer norm over {tuple(normalized_shape)} of an input of {tuple(input.shape)}")
    return torch.empty_like(input)


def _projected(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.ndim != 2:
        return F.linear(input, weight, bias)
    if input.shape[-1] != weight.shape[1]:
        raise RuntimeError(f"a weight of {tuple(weight.shape)} for an input of {tuple(input.shape)}")
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _attended(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *others: Any, **options: Any
) -> Tensor:
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *others, **options)
    scores = torch.Size((*query.shape[:-1], key.shape[-2]))
    fits = attn_mask is None or torch.broadcast_shapes(attn_mask.shape, scores) == scores
    if not fits or query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise RuntimeError("the shapes of queries, keys, values and mask don't fit")
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _activated(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(input)


SHAPES: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _normalised,
    F.linear: _projected,
    F.scaled_dot_product_attention: _attended,
    F.gelu: _activated,
}
