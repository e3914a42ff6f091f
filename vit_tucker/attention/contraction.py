"""Products of a layer in the order that costs least: few large matrix products, none computed twice, no factor applied too wide.

All functions work on whatever autocast makes of their arguments, and are leaves in fx graphs: the choices depend on shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_tucker.attention.tracing import is_traced, own_only

CACHE_BYTES = 2 << 20
"""What a core's second-level cache holds, about."""


def chain_macs(tokens: Any, left: int, inner: Any, right: Any) -> Any:
    """Returns the multiply-adds of x A B in the better order.

    (x A) B costs tokens * inner * (left + right), x (A B) costs left * right * (tokens + inner). Arguments may be tensors.

    Args:
        tokens: rows of x, a number or a tensor of any shape that broadcasts with ``inner``.
        left: columns of x and rows of A.
        inner: columns of A and rows of B, a number or a tensor.
        right: columns of B.
    """
    apart, folded = tokens * inner * (left + right), left * right * (tokens + inner)
    if isinstance(apart, Tensor) or isinstance(folded, Tensor):
        return torch.minimum(*torch.broadcast_tensors(torch.as_tensor(apart), torch.as_tensor(folded)))
    return min(apart, folded)


def open_shape(x: Tensor) -> bool:
    """Returns whether the number of tokens may be open, because a graph is recorded; one token per text is never open.

    Args:
        x: (B, N, C) tokens.
    """
    return not isinstance(x, Tensor) or (is_traced() and (own_only() or x.shape[1] != 1))


def folds(x: Tensor, left: int, inner: int, right: int) -> bool:
    """Returns whether x (A B) costs less than (x A) B, see ``chain_macs``; open numbers of tokens count as large.

    Args:
        x: (B, N, left) tokens.
        left, inner, right: sizes of A (left, inner) and B (inner, right).
    """
    if open_shape(x):
        return left * right < inner * (left + right)
    tokens = x.shape[0] * x.shape[1]
    return left * right * (tokens + inner) < tokens * inner * (left + right)


def is_plain(*linears: nn.Module) -> bool:
    """Returns whether these are Linears and nothing else.

    An adapter, quantisation, parametrisation, hook or sharding would be lost in a product with their weights.
    """
    return all(
        type(linear) is nn.Linear
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and not linear._backward_hooks
        and not linear._backward_pre_hooks
        and "forward" not in linear.__dict__
        and not hasattr(linear._parameters.get("weight"), "__tensor_flatten__")  # torchao's, DTensors
        for linear in linears
    )


def joint_linear(x: Tensor, linears: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """Computes several Linears of one input as one product, where they are narrow: x is read once, its gradient written once.

    x is (B, N, C); the outputs, (B, N, O_i) each, are views of one tensor, or tensors of their own.
    """
    if not is_plain(*linears):
        return tuple(linear(x) for linear in linears)
    return joint_product(x, [linear.weight for linear in linears], [linear.bias for linear in linears])


@torch.fx.wrap
def joint_product(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Computes ``joint_linear`` from weights and biases.

    Args:
        x: (B, N, C).
        weights: (O_i, C) each.
        biases: (O_i,) each, or None.
    """
    widths = [weight.shape[0] for weight in weights]
    if not joins(x, widths):
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    return F.linear(x, torch.cat(list(weights)), joint_bias(widths, biases)).split_with_sizes(widths, -1)


def joins(x: Tensor, widths: Sequence[int]) -> bool:
    """Returns whether projections of these widths are computed as one product, with a copy of their weights.

    That is so in training, where the gradient of x is written once; else where x is read from memory each time.

    Args:
        x: (B, N, C) tokens.
        widths: output columns of each projection.
    """
    if len(widths) == 1 or sum(widths) > x.shape[2]:  # the copy may cost more than reading x again
        return False
    return torch.is_grad_enabled() or open_shape(x) or x.numel() * x.element_size() > CACHE_BYTES


def joint_bias(widths: Sequence[int], biases: Sequence[Tensor | None]) -> Tensor | None:
    """Returns biases side by side, zeros where there is none; None if there is none at all.

    Args:
        widths: output columns of each projection.
        biases: (width,) each, or None.
    """
    first, *rest = biases
    if all(bias is None for bias in rest):  # Tucker Attention's usual case: only queries have one
        return None if first is None else F.pad(first, (0, sum(widths) - widths[0]))
    given = next(bias for bias in biases if bias is not None)
    return torch.cat([given.new_zeros(n) if bias is None else bias for n, bias in zip(widths, biases, strict=True)])
