"""Speed-ups of calls that are timed in turns, and the calls themselves: forward passes and training steps of a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.analysis.interleaved import compare_turns, peak_bytes, times_in_turns

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Timing:
    """What turns said of one of the things compared.

    Attributes:
        ms: milliseconds per call: the first's median over turns by ``speedup``.
        speedup: time of the first of them over its own in the same turn, median over turns; above 1: faster.
        low, high: quartiles of that ratio.
    """

    ms: float
    speedup: float
    low: float
    high: float


def in_turns(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, turns: int = 15, seconds: float = 0.1
) -> dict[str, Timing]:
    """Time calls against the first of them.

    Args:
        calls: by name.
        device: what they run on.
        turns: how often each has its turn, 2 at least.
        seconds: that a turn lasts at least; always one call or more.
    """
    times = times_in_turns(calls, device, turns, seconds)
    first = times[next(iter(calls))]
    results = {}
    for name, own in times.items():
        paired = compare_turns(first, own)
        results[name] = Timing(1e3 * paired.seconds, 1 / paired.ratio, 1 / paired.ratio_high, 1 / paired.ratio_low)
    return results


def inference(module: nn.Module, x: Tensor, precision: str) -> Callable[[], Any]:
    """A forward pass without gradients, under autocast but for fp32."""
    autocast = torch.autocast(x.device.type, DTYPES[precision], enabled=precision != "fp32")

    def call() -> Any:
        with torch.inference_mode(), autocast:
            return module(x)

    return call


def training(module: nn.Module, x: Tensor, precision: str, input_grad: bool = True) -> Callable[[], Any]:
    """A forward and a backward pass, the gradients of the weights dropped afterwards.

    Args:
        module: in training mode.
        x: input.
        precision: of autocast.
        input_grad: the gradient of the input is computed as well, as it is within a model.
    """
    autocast = torch.autocast(x.device.type, DTYPES[precision], enabled=precision != "fp32")

    def call() -> None:
        given = x.detach().requires_grad_(input_grad)
        with autocast:
            y = module(given)
        y.sum().backward()
        module.zero_grad(set_to_none=True)

    return call


def peak_megabytes(call: Callable[[], Any], module: nn.Module, x: Tensor) -> float:
    """Most MB (10^6 bytes) that a call has alive at once, parameters and input apart, gradients included; see ``peak_bytes``."""
    call()
    return peak_bytes(call, [x, *module.parameters(), *module.buffers()], x.device) / 1e6
