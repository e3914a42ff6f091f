"""The one place that computes softmax(Q K^T) V, for any number of key/value heads.

With fewer key/value heads G than heads H, the queries of a group are packed into one head of (H/G) * N queries against the
group's keys and values: exact, since each query's softmax is its own, and no kernel sees expanded keys. With a mask the heads
stay apart and the keys are expanded.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    attn_drop: nn.Dropout,
    fused: bool,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """softmax(scale * Q K^T + mask) V.

    Args:
        q: (B, H, N, Dk).
        k: (B, G, N, Dk), G divides H; head i uses key/value head i // (H / G).
        v: (B, G, N, Dv).
        scale: factor on the scores.
        attn_drop: dropout of the attention weights; called as a module in the unfused path, so that hooks see the maps.
        fused: use scaled_dot_product_attention; else plain matrix products, with the maps (B, H, N, N) in memory.
        attn_mask: boolean (True: attend) or additive, broadcasts to (B, H, N, N).
        is_causal: attend to earlier tokens and the token itself; takes precedence over the mask.

    Returns:
        (B, H, N, Dv).
    """
    if fused:
        dropout = attn_drop.p if attn_drop.training else 0.0
        return fused_attention(q, k, v, attn_mask, is_causal, scale, dropout)
    attn = (q * scale) @ expand_heads(k, q.shape[1]).transpose(-2, -1)
    attn = add_mask(attn, attn_mask, is_causal)
    attn = attn.softmax(dim=-1)
    attn = attn_drop(attn)
    return attn @ expand_heads(v, q.shape[1])


@torch.fx.wrap
def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, dropout: float
) -> Tensor:
    """``attend`` by scaled_dot_product_attention. A leaf in fx graphs: the choice of path depends on the mask."""
    heads, tokens = q.shape[1:3]
    kv_heads = k.shape[1]
    group = heads // kv_heads
    if is_causal:
        attn_mask = None
    if group == 1 or is_causal or attn_mask is not None:
        k, v = expand_heads(k, heads), expand_heads(v, heads)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=scale
        )
    # (B, H, N, D) -> (B, N, G, H/G, D) -> (B, G, N * H/G, D): a view for G = 1 and token-major storage
    q = q.transpose(1, 2).unflatten(2, (kv_heads, group)).transpose(1, 2).flatten(2, 3)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return y.unflatten(2, (tokens, group)).transpose(1, 2).flatten(2, 3).transpose(1, 2)


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """(B, G, N, D) -> (B, H, N, D), each head repeated H / G times in a row; a view for G = 1 and G = H."""
    return _expand_heads(x, heads)


@torch.fx.wrap
def _expand_heads(x: Tensor, heads: int) -> Tensor:
    """A leaf in fx graphs, which torch.fx finds by its name in this module only."""
    if x.shape[1] in (1, heads):
        return x.expand(-1, heads, -1, -1)
    return x.repeat_interleave(heads // x.shape[1], dim=1)


@torch.fx.wrap
def add_mask(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Scores (B, H, N, N) with a boolean, additive or causal mask, as scaled_dot_product_attention reads it."""
    if is_causal:
        tokens = scores.shape[-1]
        return scores + scores.new_full((tokens, tokens), float("-inf")).triu(1)
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, float("-inf"))
    return scores + attn_mask


def attend_flops(num_heads: int, num_tokens: int, key_dim: int, value_dim: int) -> int:
    """Operations of the two matrix products of attention for one image: 2 H N^2 (Dk + Dv)."""
    return 2 * num_heads * num_tokens**2 * (key_dim + value_dim)
