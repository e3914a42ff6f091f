"""Operations of our own kernels for torch's ``FlopCounterMode``, which else would count them as nothing.

Two per multiply-add, of matrix products only, what a backward pass computes again included: as torch counts its own kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from vit_tucker.attention.backends import blocked_products, tucker_cpu
from vit_tucker.attention.triton_tucker import op as triton

Shape = tuple[int, ...]
_ops = torch.ops.vit_tucker
_ = (blocked_products, tucker_cpu, triton)  # they register the operations


def scores(q: Shape, k: Shape, v: Shape) -> tuple[int, int]:
    """Returns the multiply-adds of Q K^T and of P V.

    Args:
        q, k, v: shapes (B, M, Dk), (B, N, Dk) and (B, N, Dv).
    """
    batch, rows, width = q
    return batch * rows * k[1] * width, batch * rows * k[1] * v[2]


def cores(p: Shape, pre: Shape, post: Shape) -> tuple[int, int]:
    """Returns the multiply-adds of P T_i and of Y_i S_i^T for all heads.

    Args:
        p: shape (B, N, r2).
        pre, post: shapes (H, r2, r3) and (H, r2t, r3t).
    """
    tokens = p[0] * p[1]
    return tokens * pre[0] * pre[1] * pre[2], tokens * post[0] * post[1] * post[2]


@register_flop_formula(_ops.blocked_attention)
def blocked_flops(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Returns the operations of both products of ``blocked_attention``.

    Args:
        q, k, v: shapes, see ``scores``.
        _, __: other arguments of the operation, not used.
    """
    return 2 * sum(scores(q, k, v))


@register_flop_formula(_ops.blocked_attention_backward)
def blocked_backward_flops(dy: Shape, maps: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Returns the operations of Q K^T again unless maps were kept, of dQ and dK; of dY V^T and dV.

    Args:
        dy, maps, q, k, v: shapes, see ``blocked_attention_backward``.
        _, __: other arguments of the operation, not used.
    """
    keys, values = scores(q, k, v)
    return 2 * ((2 if maps[0] else 3) * keys + 2 * values)


@register_flop_formula([_ops.latent_attention, _ops.triton_tucker_attention])
def whole_flops(p: Shape, k: Shape, v: Shape, pre: Shape, post: Shape, *_: Any, **__: Any) -> int:
    """Returns the operations of queries, both products of attention and outputs.

    Args:
        p, k, v, pre, post: shapes, see ``TuckerCall``.
        _, __: other arguments of the operation, not used.
    """
    rows = (p[0], p[1] * pre[0], pre[2])
    return 2 * (sum(cores(p, pre, post)) + sum(scores(rows, k, v)))


@register_flop_formula(_ops.latent_attention_backward)
def latent_backward_flops(
    dz: Shape, y: Shape, lse: Shape, p: Shape, k: Shape, v: Shape, pre: Shape, post: Shape, *_: Any, **__: Any
) -> int:
    """Returns the operations of queries and Q K^T again, and of two products for each of the forward pass.

    Args:
        dz, y, lse, p, k, v, pre, post: shapes, see ``latent_attention_backward``.
        _, __: other arguments of the operation, not used.
    """
    keys, values = scores((p[0], p[1] * pre[0], pre[2]), k, v)
    queries, outputs = cores(p, pre, post)
    return 2 * (3 * queries + 2 * outputs + 3 * keys + 2 * values)


@register_flop_formula(_ops.triton_tucker_attention_backward)
def triton_backward_flops(
    dz: Shape, lse: Shape, p: Shape, k: Shape, v: Shape, pre: Shape, post: Shape, *_: Any, **__: Any
) -> int:
    """Returns the operations of ``latent_backward_flops``, and of Q K^T and P V once more.

    The kernels for rows need outputs, those for keys the maps.

    Args:
        dz, lse, p, k, v, pre, post: shapes, see ``latent_attention_backward``.
        _, __: other arguments of the operation, not used.
    """
    keys, values = scores((p[0], p[1] * pre[0], pre[2]), k, v)
    queries, outputs = cores(p, pre, post)
    return 2 * (3 * queries + 2 * outputs + 5 * keys + 4 * values)
