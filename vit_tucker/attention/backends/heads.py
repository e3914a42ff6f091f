"""Heads that share a key and a value: packed into the queries of one head, or the key and value repeated for them."""

import torch
from torch import Tensor


def pack_heads(q: Tensor, kv_heads: int) -> Tensor:
    """Packs the queries of each group of heads into those of one head, token by token: (B, H, N, D) -> (B, G, N * H/G, D).

    A view for G = 1 if the queries lie token by token in memory, as a projection leaves them.
    """
    if kv_heads == 1:
        return q.transpose(1, 2).flatten(1, 2).unsqueeze(1)
    return q.transpose(1, 2).unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3)


def stack_heads(q: Tensor, tasks: int) -> Tensor:
    """Stacks the queries of neighbouring heads, head by head: (B, H, N, D) -> (B, tasks, H/tasks * N, D); a view for N = 1."""
    return q.reshape(q.shape[0], tasks, -1, q.shape[3])


def stack_mask(attn_mask: Tensor, q: Tensor, tasks: int) -> Tensor:
    """Returns the mask of ``stack_heads``, which broadcasts to (B, tasks, H/tasks * Nq, Nk).

    Args:
        attn_mask: broadcasts to (B, H, Nq, Nk).
        q: (B, H, Nq, Dk), as given to ``stack_heads``.
        tasks: of ``stack_heads``.
    """
    if attn_mask.ndim < 4:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    images, heads, rows, keys = attn_mask.shape
    if heads == 1 and (rows == 1 or q.shape[1] == tasks):
        return attn_mask
    return attn_mask.expand(-1, q.shape[1], q.shape[2], -1).reshape(images, tasks, -1, keys)


def unpack_heads(y: Tensor, num_heads: int) -> Tensor:
    """Undoes ``pack_heads``: (B, G, N * H/G, D) -> (B, H, N, D)."""
    if y.shape[1] == 1:
        return y.unflatten(2, (-1, num_heads)).squeeze(1).transpose(1, 2)
    group = num_heads // y.shape[1]
    return y.unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3).transpose(1, 2)


@torch.fx.wrap
def expand_heads(x: Tensor, heads: int) -> Tensor:
    """Returns (B, G, N, D) as (B, H, N, D), each head repeated H / G times in a row; a view for G = 1 and G = H."""
    if x.shape[1] == heads:
        return x
    if x.shape[1] == 1:
        return x.expand(-1, heads, -1, -1)
    return x.repeat_interleave(heads // x.shape[1], dim=1)


@torch.fx.wrap
def shared_matmul(x: Tensor, y: Tensor) -> Tensor:
    """Multiplies each head's matrix (B, H, N, I) by the one that its group shares, (B, G, I, J), which is not copied.

    Returns:
        (B, H, N, J).
    """
    if x.shape[1] == y.shape[1]:
        return x @ y
    products = stack_heads(x, y.shape[1]) @ y
    return products.reshape(*x.shape[:3], y.shape[3])
