"""The flash-attn package, called with its own grouped heads: one key/value head for all heads is multi-query attention to it.

Its kernels take one width for queries, keys and values, a multiple of 8 and at most 256: narrower ones are padded with zeros,
which change neither scores nor outputs. Source: Dao, FlashAttention-2, arXiv 2307.08691; github.com/Dao-AILab/flash-attention.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from typing import Any

import torch
from torch import Tensor

from vit_tucker.attention.backends.base import LOW_PRECISION, Backend, Facts
from vit_tucker.attention.backends.padding import round_up
from vit_tucker.attention.backends.registry import register_backend
from vit_tucker.errors import one_line

OLDEST = (2, 1)
"""Since 2.1 causal order is aligned as torch's; grouped heads and softmax_scale are there since 2.0."""
NEWEST_MAJOR = 2
ALIGNMENT, LARGEST_WIDTH = 8, 256
OLDEST_CAPABILITY = (8, 0)
flash_attn_func: Any = None
"""The package's function, once ``missing`` has found it: an import within a call would break the graphs of torch.compile."""


def refuses(facts: Facts) -> str | None:
    """Refuses all but CUDA, two-byte floats, no mask or causal order, widths up to 256, and a known version of the package."""
    if facts.device != "cuda":
        return "it is for CUDA"
    if facts.dtype not in LOW_PRECISION:
        return "it supports float16 and bfloat16 only: train with --mixed_precision bf16"
    if facts.mask in ("boolean", "additive"):
        return f"it supports no {facts.mask} mask"
    width, _ = widths(facts)
    if width > LARGEST_WIDTH:
        return f"width {width} is above {LARGEST_WIDTH}"
    if facts.own_only:
        return "exports and torch.func allow torch's own operations only"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        return "it needs compute capability 8.0 (A100, RTX 30xx) or later"
    return missing()


@functools.cache
def missing() -> str | None:
    """Returns why the package can't be used: absent, too old, too new, or broken."""
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return "flash-attn is not installed: pip install 'vit_tucker[flash]'"
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())  # (2, 8) of '2.8.3.post1'
    if numbers < OLDEST or numbers[0] > NEWEST_MAJOR:
        return f"flash-attn {version} is installed, {OLDEST[0]}.{OLDEST[1]} or later and below {NEWEST_MAJOR + 1} is needed"
    global flash_attn_func
    try:
        flash_attn_func = importlib.import_module("flash_attn").flash_attn_func
    except Exception as error:  # built for another torch or CUDA
        return f"flash-attn {version} can't be imported: {one_line(error, 200)}"
    return None


def widths(facts: Facts) -> tuple[int, int]:
    """Returns the kernel's one width."""
    width = round_up(max(facts.key_width, facts.value_width), ALIGNMENT)
    return width, width


def attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, dropout: float
) -> Tensor:
    """Returns softmax(Q K^T) V by the package's function; arguments as of ``fused_attention``."""
    by_tokens = (t.transpose(1, 2) for t in (q, k, v))  # (B, N, heads, width)
    y: Tensor = flash_attn_func(*by_tokens, dropout_p=dropout, softmax_scale=scale, causal=is_causal)
    return y.transpose(1, 2)


register_backend(Backend("flash_attn", refuses, attend, widths=widths))
