"""Our own Triton kernels of Tucker Attention as a whole, see ``vit_tucker.attention.triton_tucker``."""

from __future__ import annotations

import torch

from vit_tucker.attention.backends.base import Backend, Facts
from vit_tucker.attention.backends.registry import register_backend
from vit_tucker.attention.triton_tucker import available, unsupported
from vit_tucker.attention.triton_tucker.tiles import Ranks, shared_memory

MASKS = {"none": "none", "causal": "none", "boolean": "boolean", "additive": "additive"}
"""Causal order is not a mask in memory."""


def refuses(facts: Facts) -> str | None:
    """Tucker Attention on CUDA (or in Triton's interpreter), without dropout and trained masks."""
    if facts.ranks is None:
        return "it computes Tucker Attention as a whole, not heads' queries and keys"
    if facts.export:
        return "exports hold torch's own operations only"
    device = torch.device(facts.device)
    return available(device) or unsupported(
        facts.dtype,
        Ranks(*facts.ranks),
        mask=MASKS[facts.mask],  # type: ignore[arg-type]
        mask_requires_grad=facts.mask_grad,
        dropout=facts.dropout,
        shared_memory=shared_memory(device),
    )


register_backend(Backend("triton", refuses, None))
