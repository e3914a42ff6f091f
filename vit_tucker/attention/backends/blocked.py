"""Plain products on the CPU block by block, see ``blocked_products``."""

from __future__ import annotations

import torch
from torch import Tensor

from vit_tucker.attention.backends.base import Backend, Facts
from vit_tucker.attention.backends.blocked_products import blocked_attention
from vit_tucker.attention.backends.heads import pack_heads, unpack_heads
from vit_tucker.attention.backends.registry import register_backend


def refuses(facts: Facts) -> str | None:
    """Refuses all but calls on the CPU without mask and dropout."""
    if facts.device != "cpu":
        return "it is for CPUs"
    if facts.mask != "none":
        return f"it supports no {facts.mask} mask"
    if facts.dropout:
        return "it has no dropout of the attention weights"
    return "exports and torch.func allow torch's own operations only" if facts.own_only else None


def attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, dropout: float
) -> Tensor:
    """Returns softmax(Q K^T) V by plain products of blocks; arguments as of ``fused_attention``."""
    heads, (batch, kv_heads) = q.shape[1], k.shape[:2]
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    keep = grad and room_for_maps(q, k, v, scale)
    y, _ = blocked_attention(pack_heads(q, kv_heads).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale, keep)
    return unpack_heads(y.unflatten(0, (batch, kv_heads)), heads)


def room_for_maps(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Returns whether keeping the maps for the backward pass takes no more memory than dense attention.

    Dense attention keeps 4 H D numbers per token, where 1 / sqrt(D) is the scale. The maps can be kept where many heads share a
    narrow key and tokens are few. Arguments as of ``fused_attention``.
    """
    if torch.compiler.is_compiling():  # the number of tokens may be open
        return False
    heads, kv_heads, tokens = q.shape[1], k.shape[1], k.shape[2]
    return heads * tokens + (heads + kv_heads) * (q.shape[3] + v.shape[3]) <= 4 * heads / scale**2


register_backend(Backend("blocked", refuses, attend))
