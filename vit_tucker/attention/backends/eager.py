"""Plain matrix products, with the attention maps (B, H, N, N) in memory: for whoever wants to see them, and for any case.

Where nothing is trained, long texts (prompts in bfloat16 on the CPU) are computed some queries at a time.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_tucker.attention.backends import heads
from vit_tucker.attention.backends.base import Backend, Facts
from vit_tucker.attention.backends.masks import masked_softmax, open_softmax, zero_rows
from vit_tucker.attention.backends.registry import register_backend
from vit_tucker.attention.contraction import CACHE_BYTES
from vit_tucker.attention.tracing import is_traced

LEAST_ROWS = 64
"""Queries of a text that are computed at once in inference; more where the scores of more fit a core's cache."""


def refuses(facts: Facts) -> str | None:
    """Returns None: plain matrix products support every call."""
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, dropout: float
) -> Tensor:
    """Returns softmax(Q K^T) V by plain products of all heads at once; arguments as of ``fused_attention``."""
    if not is_traced() and not torch.is_grad_enabled() and not dropout:
        rows = max(LEAST_ROWS, CACHE_BYTES // (q.shape[0] * q.shape[1] * k.shape[2] * q.element_size() or 1))
        if rows < q.shape[2]:
            return attend_in_parts(q, k, v, attn_mask, is_causal, scale, rows)
    attn, blind = open_softmax(scores_of(q, k, scale), attn_mask, is_causal)
    return zero_rows(heads.shared_matmul(F.dropout(attn, dropout), v), blind)  # outputs are smaller than maps


def attend_in_parts(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, rows: int
) -> Tensor:
    """Returns what ``attend`` does, of some queries at a time; in causal order later keys are left out.

    Args:
        q: (B, H, Nq, Dk).
        k, v: (B, G, Nk, Dk), (B, G, Nk, Dv).
        attn_mask: broadcasts to (B, H, Nq, Nk), or None.
        is_causal, scale: as of ``fused_attention``.
        rows: queries at a time.
    """
    parts = []
    for start in range(0, q.shape[2], rows):
        some, end = q[:, :, start : start + rows], k.shape[2]
        mask = attn_mask
        if is_causal:
            end = start + some.shape[2]
            mask = torch.ones(some.shape[2], end, dtype=torch.bool, device=q.device).tril(start)
        elif mask is not None and mask.ndim > 1 and mask.shape[-2] > 1:
            mask = mask[..., start : start + rows, :]
        parts.append(attend(some, k[:, :, :end], v[:, :, :end], mask, False, scale, 0.0))
    return torch.cat(parts, 2)


def attention_weights(q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """Returns softmax(scale * Q K^T + mask), (B, H, N, N), also of fx proxies; arguments as of ``fused_attention``."""
    return masked_softmax(scores_of(q, k, scale), attn_mask, is_causal)


def scores_of(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Returns scale * Q K^T, (B, H, N, N); arguments as of ``fused_attention``."""
    return heads.shared_matmul(q * scale, k.transpose(-2, -1))


register_backend(Backend("eager", refuses, attend))
