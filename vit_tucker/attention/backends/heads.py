"""Heads that share a key and a value: packed into the queries of one head, or the key and value repeated for them."""

import torch
from torch import Tensor


def pack_heads(q: Tensor, kv_heads: int) -> Tensor:
    """The queries of each group of heads as those of one head, token by token: (B, H, N, D) -> (B, G, N * H/G, D).

    A view for G = 1 if the queries lie token by token in memory, as a projection leaves them.
    """
    if kv_heads == 1:
        return q.transpose(1, 2).flatten(1, 2).unsqueeze(1)
    return q.transpose(1, 2).unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3)


def unpack_heads(y: Tensor, num_heads: int) -> Tensor:
    """The inverse: (B, G, N * H/G, D) -> (B, H, N, D)."""
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
