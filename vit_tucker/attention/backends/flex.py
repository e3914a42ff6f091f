"""torch's flex_attention, compiled: masks are read inside the kernel, heads that share a key stay grouped.

Source: torch.nn.attention.flex_attention (torch >= 2.5); Dong et al., FlexAttention, arXiv 2412.05496.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vit_tucker.attention.backends.base import Backend, Facts
from vit_tucker.attention.backends.registry import register_backend

SMALLEST_WIDTH = 16


def refuses(facts: Facts) -> str | None:
    """Refuses all but CUDA without dropout and trained masks, for widths from 16."""
    if facts.device != "cuda":
        return "it is for CUDA: elsewhere torch computes it in parts"
    if facts.dropout:
        return "it has no dropout of the attention weights"
    if facts.mask_grad:
        return "its mask is not trained"
    if min(facts.key_width, facts.value_width) < SMALLEST_WIDTH:
        return f"width {min(facts.key_width, facts.value_width)} is below {SMALLEST_WIDTH}"
    return "exports and torch.func allow torch's own operations only" if facts.own_only else None


def attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, dropout: float
) -> Tensor:
    """Returns softmax(Q K^T) V by flex_attention, with the mask inside the kernel; arguments as of ``fused_attention``."""
    score_mod = mask_of_scores(attn_mask, is_causal, q)
    attention = kernel(q.is_cuda and not torch.compiler.is_compiling())
    y: Tensor = attention(q, k, v, score_mod=score_mod, scale=scale, enable_gqa=k.shape[1] < q.shape[1])
    return y


def mask_of_scores(attn_mask: Tensor | None, is_causal: bool, q: Tensor) -> Any:
    """Returns the mask as flex_attention reads it, (score, image, head, query, key) -> score, or None without one.

    Arguments as of ``fused_attention``.
    """
    if is_causal:
        return lambda score, b, h, m, n: torch.where(m >= n, score, float("-inf"))
    if attn_mask is None:
        return None
    batch, heads, tokens = q.shape[:3]
    mask = attn_mask.expand(batch, heads, tokens, tokens)  # strides of zero, no copy
    if mask.dtype == torch.bool:
        return lambda score, b, h, m, n: torch.where(mask[b, h, m, n], score, float("-inf"))
    return lambda score, b, h, m, n: score + mask[b, h, m, n]


def kernel(compiled: bool) -> Any:
    """Returns flex_attention, as it is or compiled; inside a compiled model it is compiled with that."""
    from torch.nn.attention.flex_attention import flex_attention

    return compiled_kernel() if compiled else flex_attention


@functools.cache
def compiled_kernel() -> Any:
    """Returns flex_attention compiled by torch.compile, made at the first call and shared by all layers."""
    return torch.compile(kernel(False), dynamic=False)


register_backend(Backend("flex", refuses, attend))
