"""Attention of some tokens with a past: queries of the newest tokens against the keys and values of a cache and their own."""

from __future__ import annotations

from torch import Tensor

from vit_tucker.attention.attend import fused_attention
from vit_tucker.attention.backends import AUTO


def attend_past(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Computes softmax(scale * Q K^T + mask) V, where the queries may be fewer than the keys; see ``needs_order``.

    Args:
        q: (B, H, Nq, Dk) queries of the newest tokens.
        k: (B, G, Nk, Dk) keys of the cache, the newest tokens' among them; G divides H, head i uses key/value head i // (H / G).
        v: (B, G, Nk, Dv) values.
        attn_mask: boolean (True: attend) or additive, broadcasts to (B, H, Nq, Nk); None: none, or as ``is_causal`` says.
        is_causal: the layer is a decoder's: without a mask a token attends to earlier tokens and itself.
        scale: factor on the scores.
        dropout: rate of the attention weights.

    Returns:
        (B, H, Nq, Dv), zeros for queries that may attend to nothing.
    """
    causal = needs_order(q, attn_mask, is_causal)
    if causal:
        tokens = q.shape[2]
        k, v = k[:, :, :tokens], v[:, :, :tokens]
    return fused_attention(q, k, v, attn_mask, causal, scale, dropout, AUTO)


def needs_order(q: Tensor, attn_mask: Tensor | None, is_causal: bool) -> bool:
    """Returns whether a decoder's call is in causal order although it has no mask.

    transformers leaves the mask out where one token attends to all, and where a cache was empty before: each token attends to
    earlier ones then, and the rest of a static cache's keys is empty.

    Args:
        q: (B, H, Nq, Dk).
        attn_mask: broadcasts to (B, H, Nq, Nk), or None.
        is_causal: the layer is a decoder's.
    """
    return q.shape[2] > 1 and attn_mask is None and is_causal
