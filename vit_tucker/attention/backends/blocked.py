"""Plain products on the CPU block by block, see ``blocked_products``: nothing of size N x N is kept."""

from __future__ import annotations

from torch import Tensor

from vit_tucker.attention.backends.base import Backend, Facts
from vit_tucker.attention.backends.blocked_products import blocked_attention
from vit_tucker.attention.backends.heads import pack_heads, unpack_heads
from vit_tucker.attention.backends.registry import register_backend


def refuses(facts: Facts) -> str | None:
    """CPU, without mask and dropout."""
    if facts.device != "cpu":
        return "it is for CPUs"
    if facts.mask != "none":
        return f"it takes no {facts.mask} mask"
    if facts.dropout:
        return "it has no dropout of the attention weights"
    return "exports and torch.func hold torch's own operations only" if facts.own_only else None


def attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, dropout: float
) -> Tensor:
    """See ``Backend.attend``."""
    heads, (batch, kv_heads) = q.shape[1], k.shape[:2]
    y = blocked_attention(pack_heads(q, kv_heads).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale)
    return unpack_heads(y.unflatten(0, (batch, kv_heads)), heads)


register_backend(Backend("blocked", refuses, attend))
