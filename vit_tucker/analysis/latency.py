"""Latency of models side by side: in turns in one process, so that what else the machine does hits all of them alike."""

import copy
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vit_tucker.errors import ConfigError
from vit_tucker.live_bytes import LiveBytes
from vit_tucker.patching.patch import patch_record
from vit_tucker.patching.watch import evaluating

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP = 3
"""Forward passes before anything is measured: kernels are chosen, memory is allocated, weights are cast."""


@dataclass(frozen=True)
class Latency:
    """Forward passes of one model, measured in turns with others.

    Attributes:
        device: name of the GPU, or "cpu".
        precision: "no", "bf16" or "fp16" (autocast).
        threads: of torch on the CPU.
        batch_size: images per forward pass.
        turns: how often each model had its turn.
        ms: milliseconds per batch, median over turns.
        ratio: of the model's time to the first model's in the same turn, median over turns.
        ratio_low, ratio_high: quartiles of that ratio.
        peak_bytes: most bytes that a forward pass has alive at once, model and images apart. On CUDA what the allocator handed
            out, workspaces included; elsewhere the results of operations alone.
    """

    device: str
    precision: str
    threads: int
    batch_size: int
    turns: int
    ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    peak_bytes: int


def measure_latency(
    models: Mapping[str, nn.Module],
    input_size: tuple[int, int, int],
    batch_size: int,
    device: torch.device | str,
    precision: str = "no",
    turns: int = 15,
    seconds: float = 0.2,
) -> dict[str, Latency]:
    """Time the forward passes of models, in eval mode and inference mode.

    Weights are cast once, before the first turn, as far as autocast caches them. The order within a turn alternates.

    Args:
        models: by name; ratios are to the first. They keep their modes and their device: copies run where one is elsewhere.
        input_size: (channels, height, width).
        batch_size: images per forward pass.
        device: where to run.
        precision: of autocast; "no" runs in the models' own dtype.
        turns: at least 2, for quartiles.
        seconds: how long a turn of a model lasts, at least; always one forward pass or more.

    Raises:
        ConfigError: unknown precision, or arguments that measure nothing.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision '{precision}': one of {', '.join(PRECISIONS)}")
    if not models or batch_size < 1 or turns < 2:
        raise ConfigError("latency needs a model, a batch of one image or more, and two turns or more")
    device = torch.device(device)
    ready = {name: _on_device(model, device) for name, model in models.items()}
    autocast = torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "no")
    with evaluating(*ready.values()), torch.inference_mode(), autocast:
        inputs = {name: _images(model, input_size, batch_size, device) for name, model in ready.items()}
        passes = {name: _passes(ready[name], inputs[name], seconds) for name in ready}
        times: dict[str, list[float]] = {name: [] for name in ready}
        for turn in range(turns):
            for name in list(ready)[:: 1 if turn % 2 == 0 else -1]:
                times[name].append(_time(ready[name], inputs[name], passes[name]))
        peaks = {name: _peak_bytes(ready[name], inputs[name]) for name in ready}
    first = times[next(iter(ready))]
    where = {
        "device": describe_device(device),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "turns": turns,
    }
    results = {}
    for name, own in times.items():
        low, middle, high = statistics.quantiles((b / a for a, b in zip(first, own, strict=True)), method="inclusive")
        ms = statistics.median(own) * 1e3
        results[name] = Latency(**where, ms=ms, ratio=middle, ratio_low=low, ratio_high=high, peak_bytes=peaks[name])  # type: ignore[arg-type]
    return results


def describe_device(device: torch.device) -> str:
    """'NVIDIA H200' or 'cpu'."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The model itself if it is there already, else a copy, without the dense layers that a patched model may keep."""
    index = device.index if device.index is not None or device.type != "cuda" else torch.cuda.current_device()
    if all((t.device.type, t.device.index) == (device.type, index) for t in (*model.parameters(), *model.buffers())):
        return model
    record = patch_record(model)
    return copy.deepcopy(model, {} if record is None else {id(record): record}).to(device)


def _images(model: nn.Module, input_size: tuple[int, int, int], batch_size: int, device: torch.device) -> Tensor:
    """Noise in the model's dtype: a GPU runs faster on zeros."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(batch_size, *input_size, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _passes(model: nn.Module, images: Tensor, seconds: float) -> int:
    """Warm up, then: how many forward passes last that long."""
    _time(model, images, WARM_UP)
    return max(1, round(seconds / _time(model, images, 1)))


def _time(model: nn.Module, images: Tensor, passes: int) -> float:
    """Seconds per forward pass."""
    _synchronise(images.device)
    start = time.perf_counter()
    for _ in range(passes):
        model(images)
    _synchronise(images.device)
    return (time.perf_counter() - start) / passes


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def _peak_bytes(model: nn.Module, images: Tensor) -> int:
    if images.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        model(images)
        return torch.cuda.max_memory_allocated(images.device) - before
    with LiveBytes([images, *model.parameters(), *model.buffers()]) as live:
        model(images)
    return live.peak()
