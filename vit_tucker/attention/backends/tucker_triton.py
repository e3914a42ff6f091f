"""Our own Triton kernels of Tucker Attention as a whole, see ``vit_tucker.attention.triton_tucker``."""

from __future__ import annotations

import torch
from torch import Tensor

from vit_tucker.attention.backends.base import Backend, Facts, TuckerCall
from vit_tucker.attention.backends.registry import register_backend
from vit_tucker.attention.triton_tucker import available, tucker_attention, unsupported
from vit_tucker.attention.triton_tucker.tiles import Ranks, shared_memory

MASKS = {"none": "none", "causal": "none", "boolean": "boolean", "additive": "additive"}
"""Causal order is not a mask in memory."""


def refuses(facts: Facts) -> str | None:
    """Refuses all but Tucker Attention on CUDA (or in Triton's interpreter) without dropout and trained masks."""
    if facts.ranks is None:
        return "it computes Tucker Attention as a whole, not heads' queries and keys"
    if facts.own_only:
        return "exports and torch.func allow torch's own operations only"
    device = torch.device(facts.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device here"
    return available(device) or unsupported(
        facts.dtype,
        Ranks(*facts.ranks),
        mask=MASKS[facts.mask],  # type: ignore[arg-type]
        mask_requires_grad=facts.mask_grad,
        rope=facts.angles_grad,
        angles_require_grad=facts.angles_grad,
        dropout=facts.dropout,
        shared_memory=shared_memory(device),
    )


def whole(call: TuckerCall) -> Tensor:
    """Returns Tucker Attention between its projections by our Triton kernels."""
    p, k, v, pre, post = call[:5]
    mask, causal, angles = call.attn_mask, call.is_causal, call.angles
    return tucker_attention(p, k, v, pre, post, scale=call.scale, attn_mask=mask, is_causal=causal, angles=angles)


register_backend(Backend("triton", refuses, None, whole))
