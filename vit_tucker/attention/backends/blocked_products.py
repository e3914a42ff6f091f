"""Attention by plain products, block by block: the maps of a block stay in the cache, the backward pass computes them again.

    S = Q K^T * scale,  P = softmax(S),  Y = P V
    dV = P^T dY,  dP = dY V^T,  dS = P o (dP - rowsum(P o dP)),  dQ = dS K * scale,  dK = dS^T Q * scale

Memory is that of a flash kernel, unless the maps are kept for a backward pass that is faster then. The products are oneDNN's,
made for bfloat16 on CPUs with AVX512-BF16 or AMX; ``benchmarks/attention.py --precision bf16 --backends sdpa blocked`` compares
them to torch's kernel. The maps have the inputs' dtype between products, as in any attention written in torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vit_tucker.attention.contraction import CACHE_BYTES
from vit_tucker.attention.gradients import register_gradients

BLOCK_BYTES = CACHE_BYTES
"""Of the scores of a block, for each thread."""


@torch.library.custom_op("vit_tucker::blocked_attention", mutates_args=())
def blocked_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, keep_maps: bool) -> tuple[Tensor, Tensor]:
    """Computes softmax(scale * Q K^T) V.

    Args:
        q, k, v: (B, M, Dk), (B, N, Dk), (B, N, Dv).
        scale: factor on the scores.
        keep_maps: for a backward pass that does not compute them again.

    Returns:
        y (B, M, Dv); the maps (B, M, N), without images unless they are kept.
    """
    y, maps, scaled = *allocate(q, k, v, keep_maps), k * scale
    for images, rows, (scores, spare) in blocks(q, k, 2):
        part = maps[images, rows] if keep_maps else spare
        softmax_maps(q[images, rows], scaled[images], scores, part)
        torch.bmm(part, v[images], out=y[images, rows])
    return y, maps


@blocked_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, keep_maps: bool) -> tuple[Tensor, Tensor]:
    return allocate(q, k, v, keep_maps)


def allocate(q: Tensor, k: Tensor, v: Tensor, keep_maps: bool) -> tuple[Tensor, Tensor]:
    """Allocates memory for outputs and maps; arguments as of ``blocked_attention``."""
    (batch, rows), keys = q.shape[:2], k.shape[1]
    return q.new_empty(batch, rows, v.shape[2]), q.new_empty(batch if keep_maps else 0, rows, keys)


@torch.library.custom_op("vit_tucker::blocked_attention_backward", mutates_args=())
def blocked_attention_backward(
    dy: Tensor, maps: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v; other arguments as of ``blocked_attention``.

    Sums over the blocks of an image are taken in float32.

    Args:
        dy: (B, M, Dv) gradient of the outputs.
        maps: (B, M, N), or (0, M, N) where they were not kept.
    """
    scaled = k * scale
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (k, v))
    for images, rows, (scores, spare, ds) in blocks(q, k, 3):
        q_block, dy_block = q[images, rows], dy[images, rows]
        part = maps[images, rows] if len(maps) else spare
        if not len(maps):
            softmax_maps(q_block, scaled[images], scores, part)
        dv[images] += torch.bmm(part.mT, dy_block)
        torch.bmm(dy_block, v[images].mT, out=scores)
        torch._softmax_backward_data(scores, part, -1, part.dtype, grad_input=ds)
        torch.bmm(ds, scaled[images], out=dq[images, rows])
        dk[images] += torch.bmm(ds.mT, q_block)
    return dq, dk.mul_(scale).to(k.dtype), dv.to(v.dtype)


@blocked_attention_backward.register_fake
def _(dy: Tensor, maps: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


register_gradients(blocked_attention, blocked_attention_backward, tensors=3, options=1)


def softmax_maps(q: Tensor, k: Tensor, scores: Tensor, maps: Tensor) -> None:
    """Writes softmax(Q K^T) into ``maps``.

    Args:
        q, k: (B, M, Dk) and (B, N, Dk), the scale in one of them.
        scores: (B, M, N), overwritten by the products.
        maps: (B, M, N), overwritten.
    """
    torch.bmm(q, k.mT, out=scores)
    torch._softmax(scores, -1, False, out=maps)


def rows_per_block(q: Tensor, k: Tensor) -> int:
    """Returns how many rows of queries have scores against all keys of one image that fit a block.

    Args:
        q, k: (B, M, Dk) and (B, N, Dk).
    """
    return max(1, BLOCK_BYTES * torch.get_num_threads() // (k.shape[1] * q.element_size()))


def blocks(q: Tensor, k: Tensor, rooms: int) -> Iterator[tuple[slice, slice, tuple[Tensor, ...]]]:
    """Yields the blocks of scores (B, M, N): several images, or some rows of a large one.

    Each is a slice of images, one of rows, and ``rooms`` tensors without values, (images, rows, N), in memory that all share.

    Args:
        q, k: (B, M, Dk) and (B, N, Dk).
        rooms: how many tensors of a block's shape are needed.
    """
    (batch, rows), keys = q.shape[:2], k.shape[1]
    images = max(1, rows_per_block(q, k) // max(rows, 1))
    parts = -(-rows // rows_per_block(q, k))
    step = -(-rows // parts)  # even parts
    room = q.new_empty(rooms, images * step * keys)
    for b in range(0, batch, images):
        for m in range(0, rows, step):
            shape = (min(images, batch - b), min(step, rows - m), keys)
            tensors = room[:, : shape[0] * shape[1] * keys].unflatten(1, shape).unbind()
            yield slice(b, b + images), slice(m, m + step), tensors
