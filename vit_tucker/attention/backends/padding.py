"""Pads heads to the widths that a backend's kernels need: narrower keys, values and factors get columns of zeros.

They change neither scores nor outputs. Tucker Attention gets them in its factors and latents, so that queries come out of their
product as wide as they should be; queries, keys and values of heads are copied.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from vit_tucker.attention.backends.base import Backend, Facts, TuckerCall

SMALLEST_WIDTH, STEP = 16, 4
"""Of heads in torch's CPU kernel: heads of 8 columns take it longer than heads of 16, and 63 longer than 64. Measured by
``benchmarks/widths.py``."""


def pad(x: Tensor, width: int) -> Tensor:
    """Returns ``x`` (..., columns) with columns of zeros up to ``width``."""
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x


def round_up(width: int, step: int) -> int:
    """Returns the next multiple of a step."""
    return -(-width // step) * step


def cpu_width(width: int) -> int:
    """Returns the width, at least the given one, that torch's CPU kernel computes fastest."""
    return max(SMALLEST_WIDTH, round_up(width, STEP))


def attend_padded(backend: Backend, facts: Facts, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    """Computes ``Backend.attend`` at the widths that the backend needs, (B, H, N, Dv).

    Args:
        backend: one that takes queries, keys and values.
        facts: of the call.
        q, k, v: (B, H, N, Dk), (B, G, N, Dk), (B, G, N, Dv).
        *options: the arguments of ``Backend.attend`` after q, k and v.
    """
    assert backend.attend is not None
    key_width, value_width = backend.widths(facts)
    y = backend.attend(pad(q, key_width), pad(k, key_width), pad(v, value_width), *options)
    return y if value_width == facts.value_width else y[..., : facts.value_width]


def pad_call(call: TuckerCall, key_width: int, value_width: int) -> TuckerCall:
    """Pads queries, keys and values of Tucker Attention.

    Args:
        call: with keys and values of r3 and r3t columns.
        key_width: at least r3, even where queries and keys rotate.
        value_width: at least r3t.
    """
    if call.k.shape[2] == key_width and call.v.shape[2] == value_width:
        return call
    angles = call.angles
    if angles is not None:
        rest = (0, key_width // 2 - angles[0].shape[-1])
        angles = F.pad(angles[0], rest), F.pad(angles[1], rest, value=1.0)
    return call._replace(
        k=pad(call.k, key_width),
        v=pad(call.v, value_width),
        pre=pad(call.pre, key_width),
        post=pad(call.post, value_width),
        angles=angles,
    )
