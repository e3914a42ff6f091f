"""Timing in turns: what is compared runs in one process in alternating order, so that other load hits all of it alike."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vit_tucker.analysis.live_bytes import LiveBytes
from vit_tucker.show.progress_bars import progress_bar

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of autocast; "no" leaves it off."""
WARM_UP = 3
"""Calls before anything is measured: kernels are chosen, memory is allocated, weights are cast."""


def times_in_turns(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, turns: int, seconds: float
) -> dict[str, list[float]]:
    """Returns seconds per call of each, in each of its turns.

    Args:
        calls: by name.
        device: what they run on.
        turns: how often each has its turn.
        seconds: that a turn lasts at least; always one call or more.
    """
    repeats = {}
    for name, call in calls.items():
        seconds_per_call(call, WARM_UP, device)
        repeats[name] = max(1, round(seconds / seconds_per_call(call, 1, device)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in progress_bar(range(turns), what="measuring", unit="turns"):  # which is drawn between turns
        for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(seconds_per_call(calls[name], repeats[name], device))
    return times


class Paired(NamedTuple):
    """Times of something against the first that it was measured with.

    Attributes:
        seconds: per call: the first's median over turns times ``ratio``, so that quotients of times are the ratios beside them.
            Medians of each alone would contradict these when the machine's speed changes between turns.
        ratio: of its time to the first's in the same turn, median over turns.
        ratio_low, ratio_high: quartiles of that ratio.
    """

    seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float


def compare_turns(first: Sequence[float], own: Sequence[float]) -> Paired:
    """Compares the seconds of something in each turn with those of the first in the same turn; two turns at least."""
    low, middle, high = statistics.quantiles((b / a for a, b in zip(first, own, strict=True)), method="inclusive")
    return Paired(statistics.median(first) * middle, middle, low, high)


def seconds_per_call(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Returns the mean seconds of one call.

    Args:
        call: what is measured.
        repeats: calls in a row.
        device: waited for before and after.
    """
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


def synchronise(device: torch.device) -> None:
    """Waits until a GPU has done what it was given; does nothing on a CPU."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def peak_bytes(call: Callable[[], Any], kept: Iterable[Tensor], device: torch.device) -> int:
    """Returns the most bytes that a call has alive at once, beyond tensors that are there before.

    On CUDA what the allocator handed out, workspaces included; elsewhere the results of operations, without what they use inside.

    Args:
        call: what is measured.
        kept: tensors (any shape) that are alive anyway, which are not counted.
        device: where it runs.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes(kept) as live:
        call()
    return live.peak()
