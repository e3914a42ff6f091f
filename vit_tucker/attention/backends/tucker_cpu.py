"""Tucker Attention as a whole on the CPU, some images at a time, with the memory of its outputs alone.

    Q_i = rotate(P T_i),  Y_i = softmax(scale Q_i K^T) V,  Z = sum_i Y_i S_i^T

All heads' queries of some images are formed, attended with by torch's flash kernel and dropped; the backward pass forms them
again, and their gradients never exist for all images at once. Kept are the inputs, the heads' outputs and the log-sum-exp. At
ranks whose queries are wider than the dense layer's this needs less memory than that, where ``sdpa`` needs more but is faster.
Source: arXiv 2603.30033, Eqs 2-6; Def 3.1 for rotations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vit_tucker.attention.backends.base import Backend, Facts, TuckerCall
from vit_tucker.attention.backends.registry import register_backend
from vit_tucker.attention.backends.sdpa import widths
from vit_tucker.attention.gradients import register_gradients
from vit_tucker.attention.rope import rotate

FORWARD = (
    "(Tensor p, Tensor k, Tensor v, Tensor pre, Tensor post, Tensor? sin, Tensor? cos, float scale, bool grad)"
    " -> (Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "(Tensor dz, Tensor y, Tensor lse, Tensor p, Tensor k, Tensor v, Tensor pre, Tensor post, Tensor? sin, Tensor? cos, "
    "float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
IMAGES_PER_THREAD = 2
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def refuses(facts: Facts) -> str | None:
    """Refuses all but Tucker Attention on the CPU without mask, dropout and trained angles."""
    if facts.ranks is None:
        return "it computes Tucker Attention as a whole, not heads' queries and keys"
    if facts.device != "cpu":
        return "it is for CPUs"
    if facts.mask != "none":
        return f"it supports no {facts.mask} mask"
    if facts.dropout:
        return "it has no dropout of the attention weights"
    if facts.angles_grad:
        return "its angles are not trained"
    return "exports and torch.func allow torch's own operations only" if facts.own_only else None


def whole(call: TuckerCall) -> Tensor:
    """Returns Tucker Attention between its projections, some images at a time."""
    p, k, v, pre, post = call[:5]
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (p, k, v, pre, post))
    sin, cos = (None, None) if call.angles is None else call.angles
    return latent_attention(p, k, v, pre, post, sin, cos, call.scale, grad)[0]


@torch.library.custom_op("vit_tucker::latent_attention", mutates_args=(), schema=FORWARD)
def latent_attention(
    p: Tensor,
    k: Tensor,
    v: Tensor,
    pre: Tensor,
    post: Tensor,
    sin: Tensor | None,
    cos: Tensor | None,
    scale: float,
    grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes Z, and what the backward pass needs of the way there.

    Args:
        p, k, v: (B, N, r2), (B, N, r3), (B, N, r3t), see ``TuckerCall``.
        pre, post: (H, r2, r3), (H, r2t, r3t).
        sin, cos: the call's angles, (N, r3/2) or (B, N, r3/2), or None.
        scale: factor on the scores.
        grad: a backward pass follows.

    Returns:
        z (B, N, r2t); the heads' outputs y (B, N*H, r3t), without images unless ``grad``; the log-sum-exp (B, N*H).
    """
    B, N, H = *p.shape[:2], pre.shape[0]
    pre, post = pre_columns(pre), post_rows(post)
    z, y, lse = allocate(p, v, H, post.shape[1], grad)
    for images in blocks(B):
        q = queries(p[images], pre, H, sin, cos, images)
        y_part, rows = (t.squeeze(1) for t in _flash(*packed(q, k[images], v[images]), 0.0, False, scale=scale))
        if grad:
            y[images], lse[images] = y_part, rows
        torch.matmul(y_part.reshape(-1, N, H * v.shape[2]), post, out=z[images])
    return z, y, lse


@latent_attention.register_fake
def _(p: Tensor, k: Tensor, v: Tensor, pre: Tensor, post: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return allocate(p, v, pre.shape[0], post.shape[1], rest[-1])


def allocate(p: Tensor, v: Tensor, heads: int, width: int, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Allocates memory for z, y and the log-sum-exp.

    Args:
        p, v: (B, N, r2) and (B, N, r3t).
        heads: H.
        width: r2t.
        grad: y and the log-sum-exp have the images of the batch, else none.
    """
    B, N = p.shape[:2]
    y = p.new_empty(B if grad else 0, N * heads, v.shape[2])
    sums = torch.promote_types(p.dtype, torch.float32)
    return p.new_empty(B, N, width), y, p.new_empty(y.shape[:2], dtype=sums)


@torch.library.custom_op("vit_tucker::latent_attention_backward", mutates_args=(), schema=BACKWARD)
def latent_attention_backward(
    dz: Tensor,
    y: Tensor,
    lse: Tensor,
    p: Tensor,
    k: Tensor,
    v: Tensor,
    pre: Tensor,
    post: Tensor,
    sin: Tensor | None,
    cos: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of p, k, v, pre and post; other arguments as of ``latent_attention``.

    Sums over images are taken in float32 at least.

    Args:
        dz: (B, N, r2t) gradient of the outputs.
        y, lse: (B, N*H, r3t) and (B, N*H), as ``latent_attention`` returns them.
    """
    B, N, H = *p.shape[:2], pre.shape[0]
    columns, rows = pre_columns(pre), post_rows(post)
    dp, dk, dv = (t.new_empty(t.shape) for t in (p, k, v))
    dpre, dpost = (torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (columns, rows))
    back = None if sin is None else -sin
    for images in blocks(B):
        dz_part, y_part = dz[images], y[images]
        q = queries(p[images], columns, H, sin, cos, images)
        dy = (dz_part @ rows.mT).view(y_part.shape)
        given = packed(dy, q, k[images], v[images], y_part, lse[images])
        dq, dk_part, dv_part = (t.squeeze(1) for t in _flash_backward(*given, 0.0, False, scale=scale))
        dk[images], dv[images] = dk_part, dv_part
        dq = rotated(dq.view(-1, N, H, k.shape[2]), back, cos, images).flatten(2)
        torch.matmul(dq, columns.mT, out=dp[images])
        dpre += p[images].flatten(0, 1).mT @ dq.flatten(0, 1)
        dpost += y_part.reshape(-1, H * v.shape[2]).mT @ dz_part.flatten(0, 1)
    dpre = dpre.unflatten(1, (H, -1)).transpose(0, 1).to(pre.dtype).contiguous()
    dpost = dpost.unflatten(0, (H, -1)).transpose(1, 2).to(post.dtype).contiguous()
    return dp, dk, dv, dpre, dpost


@latent_attention_backward.register_fake
def _(dz: Tensor, y: Tensor, lse: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in inputs[:5])


register_gradients(latent_attention, latent_attention_backward, tensors=7, options=1)


def blocks(batch: int) -> Iterator[slice]:
    """Yields slices of images that are computed together.

    In its backward pass torch's flash kernel distributes images over threads.
    """
    images = IMAGES_PER_THREAD * torch.get_num_threads()
    return (slice(b, b + images) for b in range(0, batch, images))


def packed(*tensors: Tensor) -> Iterator[Tensor]:
    """Yields queries of all heads, keys and values as those of one head."""
    return (t.unsqueeze(1) for t in tensors)


def pre_columns(pre: Tensor) -> Tensor:
    """Reshapes (H, r2, r3) to (r2, H*r3)."""
    return pre.transpose(0, 1).flatten(1)


def post_rows(post: Tensor) -> Tensor:
    """Reshapes (H, r2t, r3t) to (H*r3t, r2t)."""
    return post.transpose(1, 2).flatten(0, 1)


def queries(p: Tensor, pre: Tensor, heads: int, sin: Tensor | None, cos: Tensor | None, images: slice) -> Tensor:
    """Returns all heads' queries of some images, token by token: (images, N*H, r3).

    Args:
        p: (images, N, r2).
        pre: (r2, H*r3).
        heads: H.
        sin, cos: as of ``latent_attention``, (N, r3/2) or (B, N, r3/2).
        images: the rows of the angles that belong to these images.
    """
    return rotated((p @ pre).unflatten(2, (heads, -1)), sin, cos, images).flatten(1, 2)


def rotated(x: Tensor, sin: Tensor | None, cos: Tensor | None, images: slice) -> Tensor:
    """Rotates neighbouring columns as pairs.

    Args:
        x: (images, N, H, r3).
        sin, cos: as of ``latent_attention``, (N, r3/2) or (B, N, r3/2).
        images: the rows of the angles that belong to these images.
    """
    if sin is None or cos is None:
        return x
    sin, cos = (t[images].unsqueeze(2) if t.ndim == 3 else t.unsqueeze(1) for t in (sin, cos))
    return rotate(x, sin, cos)


register_backend(Backend("latent", refuses, None, whole, widths))
