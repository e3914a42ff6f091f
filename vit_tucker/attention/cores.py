"""Products with the cores of Tucker Attention in the order that costs least for this many tokens, with the layer's projections.

    queries   (x U2 + p0) T_i,  T_i = sum_j U1_ij C_j        outputs   (sum_i Y_i S_i^T) U2t^T + b,  S_i = sum_j U1t_ij Ct_j

    formed    T for all heads, then x U2 T: for many tokens
    folded    T into the projection beside it, x (U2 T): for many tokens and a rank r2 that is nearly all or more of them
    apart     (x U2) C_j, then the sum over j: for few tokens, as in decoding, where T would cost more than what it is used for

All functions are leaves in fx graphs: the choices depend on shapes. Each kind of choice is logged once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_tucker.attention.contraction import folds, joint_product, open_shape
from vit_tucker.attention.tracing import is_traced

LOGGER = logging.getLogger("vit_tucker.attention")
Order = Literal["formed", "folded", "apart"]
FEW_TOKENS = 64
"""Of a batch: with more, the products of "apart" are as fast as one with T. Measured by ``benchmarks/decoding.py``."""

REASONS: dict[Order, str] = {
    "apart": "few tokens, for which the cores of all heads are not formed",
    "formed": "the cores of all heads are formed once",
    "folded": "the cores of all heads are formed and folded into the projection",
}
_LOGGED: set[tuple[str, int, tuple[int, ...], int]] = set()


def order_macs(tokens: int, width: int, heads: int, core: Sequence[int]) -> dict[Order, int]:
    """Returns the multiply-adds of queries or outputs in each order, the projection beside the core included.

    Args:
        tokens: of the batch, B * N.
        width: C or O, of the layer's input or output.
        heads: H.
        core: (r1, r2, r3), the same of the post-softmax tensor.
    """
    r1, r2, r3 = core
    forming = heads * r1 * r2 * r3
    return {
        "apart": tokens * (width * r2 + r1 * r3 * (r2 + heads)),
        "formed": forming + tokens * r2 * (width + heads * r3),
        "folded": forming + width * heads * r3 * (r2 + tokens),
    }


def choose_order(x: Tensor, width: int, head: Tensor, core: Tensor) -> Order:
    """Chooses the order of least multiply-adds; "apart" only for few tokens in inference.

    Args:
        x: (B, N, ...) tokens.
        width: C or O.
        head: U1, (H, r1).
        core: C, (r1, r2, r3).
    """
    order = least_order(x, width, head, core)
    kind = order, head.shape[0], tuple(core.shape), width
    if not is_traced() and kind not in _LOGGED:
        _LOGGED.add(kind)
        text = "order of products '%s': %s [%d heads, core %s, projection of width %d]"
        LOGGER.info(text, order, REASONS[order], *kind[1:])
    return order


def least_order(x: Tensor, width: int, head: Tensor, core: Tensor) -> Order:
    """Returns what ``choose_order`` does, without a log.

    Args:
        x: (B, N, ...) tokens.
        width: C or O.
        head: U1, (H, r1).
        core: C, (r1, r2, r3).
    """
    heads, (r1, r2, r3) = head.shape[0], core.shape
    if open_shape(x) or torch.is_grad_enabled() or x.shape[0] * x.shape[1] > FEW_TOKENS:
        return "folded" if folds(x, width, r2, heads * r3) else "formed"
    macs = order_macs(x.shape[0] * x.shape[1], width, heads, (r1, r2, r3))
    return min(macs, key=macs.__getitem__)


@torch.fx.wrap
def latent_inputs(
    x: Tensor, head: Tensor, core: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Returns queries of all heads and the latents of keys and values: (x U2 + p0) T_i, x U3 + k0, x U3t.

    Args:
        x: (B, N, C).
        head, core: U1 (H, r1) and C (r1, r2, r3).
        weights: U2^T (r2, C), U3^T (r3, C), and U3t^T (r3t, C) unless keys and values share one.
        biases: p0 (r2,), k0 (r3,) and None, or None where there is none.

    Returns:
        q (B, H, N, r3), k (B, N, r3), and v (B, N, r3t) unless they share one.
    """
    if choose_order(x, x.shape[2], head, core) != "folded":
        p, *rest = joint_product(x, weights, biases)
        return head_products(p, x.shape[2], head, core), *rest
    pre, bias = formed_columns(head, core), biases[0]
    folded = pre.mT @ weights[0], None if bias is None else bias @ pre
    q, *rest = joint_product(x, [folded[0], *weights[1:]], [folded[1], *biases[1:]])
    return by_heads(q, head.shape[0]), *rest


@torch.fx.wrap
def head_products(p: Tensor, width: int, head: Tensor, core: Tensor) -> Tensor:
    """Returns P T_i of all heads, (B, H, N, r3), in the order "apart" or "formed".

    Args:
        p: (B, N, r2).
        width: C, of the layer's input.
        head, core: U1 (H, r1) and C (r1, r2, r3).
    """
    heads = head.shape[0]
    if choose_order(p, width, head, core) != "apart":
        return by_heads(p @ formed_columns(head, core), heads)
    parts = p.flatten(0, 1) @ core  # (r1, B*N, r3)
    return (head @ parts.flatten(1)).view(heads, *p.shape[:2], core.shape[2]).transpose(0, 1)


def by_heads(q: Tensor, heads: int) -> Tensor:
    """Returns (B, N, H*r) as (B, H, N, r), a view."""
    return q.reshape(*q.shape[:2], heads, -1).transpose(1, 2)


def formed_columns(head: Tensor, core: Tensor) -> Tensor:
    """Returns T of all heads side by side, (r2, H*r3), of U1 (H, r1) and C (r1, r2, r3)."""
    return (head @ core.flatten(1)).unflatten(1, core.shape[1:]).transpose(0, 1).flatten(1)


@torch.fx.wrap
def latent_outputs(y: Tensor, head: Tensor, core: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns (sum_i Y_i S_i^T) U2t^T + b, (B, N, O).

    Args:
        y: the heads' outputs side by side, (B, N, H*r3t).
        head, core: U1t (H, r1) and Ct (r1, r2t, r3t).
        weight: U2t, (O, r2t).
        bias: (O,) or None.
    """
    if choose_order(y, weight.shape[0], head, core) == "folded":
        return F.linear(y, weight @ formed_rows(head, core).mT, bias)
    return F.linear(head_sums(y, weight.shape[0], head, core), weight, bias)


@torch.fx.wrap
def head_sums(y: Tensor, width: int, head: Tensor, core: Tensor) -> Tensor:
    """Returns sum_i Y_i S_i^T, (B, N, r2t), in the order "apart" or "formed".

    Args:
        y: the heads' outputs side by side, (B, N, H*r3t).
        width: O, of the layer's output.
        head, core: U1t (H, r1) and Ct (r1, r2t, r3t).
    """
    if choose_order(y, width, head, core) != "apart":
        return y @ formed_rows(head, core)
    (r1, r2, r3), tokens = core.shape, y.shape[0] * y.shape[1]
    parts = head.mT @ y.reshape(tokens, -1, r3).transpose(0, 1).reshape(head.shape[0], tokens * r3)
    return (parts.view(r1, tokens, r3) @ core.mT).sum(0).view(*y.shape[:2], r2)


def formed_rows(head: Tensor, core: Tensor) -> Tensor:
    """Returns S of all heads below each other, (H*r3t, r2t), of U1t (H, r1) and Ct (r1, r2t, r3t)."""
    return (head @ core.flatten(1)).unflatten(1, core.shape[1:]).transpose(1, 2).flatten(0, 1)
