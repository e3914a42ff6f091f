"""Computes attention by torch's scaled_dot_product_attention, called so that its fused kernels accept the call.

Without a mask, queries of heads that share a key/value head are packed into one head of (H/G) * N queries: exact, since each
query's softmax is its own, and no kernel sees expanded keys. torch's CPU kernel shares the backward pass out by images and
heads, so there packing stops where it would leave threads idle; then the one key is expanded by a stride of zero. With a mask or
causal order the heads stay apart, but for few queries with a past: then each key is read once, or once per thread.

Fused kernels on the CPU want one width for keys and values: else torch would compute in parts, with maps in memory. On a GPU
torch's memory-efficient kernel takes two widths, multiples of 8.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_tucker.attention.backends.base import LOW_PRECISION, Backend, Facts, few_queries, given_widths
from vit_tucker.attention.backends.heads import expand_heads, pack_heads, stack_heads, stack_mask, unpack_heads
from vit_tucker.attention.backends.padding import cpu_width, round_up
from vit_tucker.attention.backends.registry import register_backend

ALIGNMENT = 8
"""Elements of two bytes that CUDA kernels load at once: 16 bytes."""


def refuses(facts: Facts) -> str | None:
    """Returns None: torch computes in parts what its fused kernels can't do."""
    return None


def remark(facts: Facts) -> str:
    """Returns how torch computes such calls: by one kernel, or in parts, which need memory for the maps."""
    if facts.device == "cpu" and facts.dropout:
        return "in parts: torch's CPU kernel has no dropout"
    if facts.device == "cpu" and facts.mask_grad:
        return "in parts: torch's CPU kernel does not train masks"
    if facts.device == "cuda" and facts.dtype == torch.float64:
        return "in parts: torch has no CUDA kernel for float64"
    wide = widths(facts)
    if wide == given_widths(facts):
        return "fused in torch"
    return f"fused in torch, padded to {' and '.join(str(width) for width in dict.fromkeys(wide))} columns"


def attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, dropout: float
) -> Tensor:
    """Returns softmax(Q K^T) V by torch's function, with heads that share a key packed where that pays.

    Arguments as of ``fused_attention``.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    if is_causal:
        attn_mask = None
    elif kv_heads < heads and few_queries(q, k):
        return attend_stacked(q, k, v, attn_mask, scale, dropout)
    if attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask.unsqueeze(0)  # torch's CPU kernel takes two dimensions or four
    if kv_heads < heads and attn_mask is None and not is_causal and packs(q, kv_heads):
        y = F.scaled_dot_product_attention(pack_heads(q, kv_heads), k, v, dropout_p=dropout, scale=scale)
        return unpack_heads(y, heads)
    k, v = expand_heads(k, heads), expand_heads(v, heads)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=scale
    )


def attend_stacked(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float, dropout: float) -> Tensor:
    """Returns softmax(Q K^T) V for few queries, those of heads that share a key stacked; arguments as of ``fused_attention``."""
    tasks = count_tasks(q, k.shape[1])
    if tasks > k.shape[1]:
        k, v = k.expand(-1, tasks, -1, -1), v.expand(-1, tasks, -1, -1)
    if attn_mask is not None:
        attn_mask = stack_mask(attn_mask, q, tasks)
    y = F.scaled_dot_product_attention(stack_heads(q, tasks), k, v, attn_mask=attn_mask, dropout_p=dropout, scale=scale)
    return y.reshape(*q.shape[:3], v.shape[3])


def count_tasks(q: Tensor, kv_heads: int) -> int:
    """Returns how many stacks heads are computed in: one for each key/value head, or more to have one for each thread.

    Args:
        q: (B, H, Nq, Dk).
        kv_heads: G.
    """
    threads = 1 if kv_heads > 1 or not q.is_cpu else count_threads()
    if threads <= q.shape[0]:
        return kv_heads
    wanted = -(-threads // q.shape[0])
    return next(tasks for tasks in range(min(wanted, q.shape[1]), q.shape[1] + 1) if q.shape[1] % tasks == 0)


def count_threads() -> int:
    """Returns torch's threads on the CPU; where a call is compiled those of that time."""
    return torch.get_num_threads()


count_threads._dynamo_marked_constant = True  # type: ignore[attr-defined]


def packs(q: Tensor, kv_heads: int) -> bool:
    """Returns whether to pack heads that share a key.

    On the CPU they are packed only where images and key/value heads are tasks enough for all threads.

    Args:
        q: (B, H, N, Dk).
        kv_heads: G.
    """
    if q.device.type != "cpu" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return True
    return q.shape[0] * kv_heads >= torch.get_num_threads()


def widths(facts: Facts) -> tuple[int, int]:
    """Returns the widths of keys and values that the device's fused kernel accepts, or is fast with.

    Exports keep equal widths as they are, and so does multi-head attention, which then uses as much memory as the host.
    """
    keys, values = facts.key_width, facts.value_width
    fused = not facts.dropout and not facts.mask_grad
    as_they_are = keys == values and (facts.own_only or facts.kv_heads == facts.heads)
    if facts.device == "cpu" and fused and not as_they_are:
        width = cpu_width(max(keys, values))
        return width, width
    if facts.device == "cuda" and facts.dtype in LOW_PRECISION and keys != values:
        return round_up(keys, ALIGNMENT), round_up(values, ALIGNMENT)
    return keys, values


register_backend(Backend("sdpa", refuses, attend, widths=widths, remark=remark))
