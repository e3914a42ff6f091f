"""torch's scaled_dot_product_attention, called so that its fused kernels take the call.

Without a mask, queries of heads that share a key/value head are packed into one head of (H/G) * N queries: exact, since each
query's softmax is its own, and no kernel sees expanded keys. torch's CPU kernel shares the backward pass out by images and
heads, so there packing stops where it would leave threads idle; then the one key is expanded by a stride of zero. With a mask or
causal order the heads stay apart.

On a GPU the flash kernel wants widths that are multiples of 8, the same for keys and values; torch pads where they are the same.
Where they differ its memory-efficient kernel runs, which wants multiples of 8 as well: here they are padded for it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_tucker.attention.backends.base import LOW_PRECISION, Backend, Facts
from vit_tucker.attention.backends.heads import expand_heads, pack_heads, unpack_heads
from vit_tucker.attention.backends.registry import register_backend

ALIGNMENT = 8
"""Elements of two bytes that CUDA kernels load at once: 16 bytes."""


def refuses(facts: Facts) -> str | None:
    """Takes everything; what its fused kernels can't do, torch computes in parts."""
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, dropout: float
) -> Tensor:
    """See ``Backend.attend``."""
    heads, kv_heads, width = q.shape[1], k.shape[1], v.shape[3]
    if q.is_cuda and q.dtype in LOW_PRECISION and q.shape[3] != width:
        q, k, v = (pad_width(t) for t in (q, k, v))
    if is_causal:
        attn_mask = None
    if kv_heads < heads and attn_mask is None and not is_causal and packs(q, kv_heads):
        y = F.scaled_dot_product_attention(pack_heads(q, kv_heads), k, v, dropout_p=dropout, scale=scale)
        return unpack_heads(y, heads)[..., :width]
    k, v = expand_heads(k, heads), expand_heads(v, heads)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=scale
    )
    return y[..., :width]


def packs(q: Tensor, kv_heads: int) -> bool:
    """Whether to pack: on the CPU only where images and key/value heads are tasks enough for all threads."""
    if q.device.type != "cpu" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return True
    return q.shape[0] * kv_heads >= torch.get_num_threads()


def pad_width(x: Tensor) -> Tensor:
    """Zeros up to the next multiple of ALIGNMENT in the last dimension."""
    rest = -x.shape[-1] % ALIGNMENT
    return F.pad(x, (0, rest)) if rest else x


register_backend(Backend("sdpa", refuses, attend))
