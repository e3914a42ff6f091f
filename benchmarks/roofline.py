"""What a layer could take at best: how fast a machine multiplies, exponentiates and copies, and what the layer needs of each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from turns import DTYPES

from vit_tucker.analysis.interleaved import seconds_per_call
from vit_tucker.attention.base import AttentionConfig
from vit_tucker.attention.host import HostSpec

BACKWARD = 2
"""Products of a backward pass per product of the forward pass."""


@dataclass(frozen=True)
class Machine:
    """Rates of a device in one dtype, measured.

    Attributes:
        flops: multiplications and additions per second, of a large matrix product.
        exps: exponentials per second, of float32 in the cache: softmax computes one for each score.
        bandwidth: bytes per second, read or written, of a copy that no cache holds.
    """

    flops: float
    exps: float
    bandwidth: float


@cache
def measure_machine(device: torch.device, precision: str, tries: int = 7) -> Machine:
    """Measures the rates, each the best of several tries; once per process."""
    dtype = DTYPES[precision]
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    some = torch.randn(1 << (17 if device.type == "cpu" else 24), device=device)
    out = torch.empty_like(some)
    large = torch.empty(1 << (27 if device.type == "cpu" else 30), device=device, dtype=torch.uint8)
    copy = torch.empty_like(large)
    with torch.inference_mode():
        best = {
            name: min(seconds_per_call(call, repeats, device) for _ in range(tries))
            for name, call, repeats in (
                ("product", lambda: a @ b, 3),
                ("exp", lambda: torch.exp(some, out=out), 50),
                ("copy", lambda: copy.copy_(large), 2),
            )
        }
    return Machine(2 * size**3 / best["product"], some.numel() / best["exp"], 2 * large.numel() / best["copy"])


def floor_ms(
    config: AttentionConfig, spec: HostSpec, batch: int, tokens: int, machine: Machine, precision: str, train: bool
) -> tuple[float, float, float]:
    """Milliseconds that products, exponentials, and reading and writing tokens take at the machine's rates.

    Products: those of the config's FLOP count, in training three times as many. Exponentials: one for each score, in training
    two, since flash kernels compute the maps again. Memory: tokens read and written once, in training their gradients as well;
    what is between may stay in caches. A layer that does nothing else and overlaps nothing takes the sum.
    """
    passes = 1 + BACKWARD * train
    products = passes * batch * config.count_flops(spec, tokens) / machine.flops
    exps = (1 + train) * batch * spec.num_heads * tokens**2 / machine.exps
    width = DTYPES[precision].itemsize
    copies = passes * batch * tokens * (spec.embed_dim + spec.out_dim) * width / machine.bandwidth
    return products * 1e3, exps * 1e3, copies * 1e3
