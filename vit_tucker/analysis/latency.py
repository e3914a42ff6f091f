"""Latency of models side by side: in turns in one process, so that what else the machine does hits all of them alike."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.analysis.interleaved import PRECISIONS, compare_turns, peak_bytes, times_in_turns
from vit_tucker.conversion.observe import evaluating
from vit_tucker.errors import ConfigError
from vit_tucker.patching.record import shared_records


@dataclass(frozen=True)
class Latency:
    """Forward passes of one model, measured in turns with others.

    Attributes:
        device: name of the GPU, or "cpu".
        precision: "no", "bf16" or "fp16" (autocast).
        threads: of torch on the CPU.
        batch_size: images per forward pass.
        turns: how often each model had its turn.
        ms: milliseconds per batch: the first model's median over turns times ``ratio``.
        ratio: of the model's time to the first model's in the same turn, median over turns.
        ratio_low, ratio_high: quartiles of that ratio.
        peak_bytes: most bytes that a forward pass has alive at once, model and images apart, see ``interleaved.peak_bytes``.
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
    """Times the forward passes of models, in eval mode and inference mode.

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
        calls = {name: partial(model, inputs[name]) for name, model in ready.items()}
        times = times_in_turns(calls, device, turns, seconds)
        peaks = {name: peak_bytes(calls[name], [inputs[name], *model.parameters(), *model.buffers()], device)
                 for name, model in ready.items()}  # fmt: skip
    first = times[next(iter(ready))]
    where = describe_device(device), precision, torch.get_num_threads(), batch_size, turns
    results = {}
    for name, own in times.items():
        seconds, ratio, low, high = compare_turns(first, own)
        results[name] = Latency(*where, 1e3 * seconds, ratio, low, high, peaks[name])
    return results


def latency_to_dense(
    model: nn.Module,
    dense: nn.Module,
    input_size: tuple[int, int, int],
    batch_size: int,
    device: torch.device | str,
    precision: str,
    turns: int = 15,
    seconds: float = 0.05,
) -> dict[str, Any]:
    """Measures the entry ``latency`` of ``cost``, the model and its dense host in turns: see ``Latency``, with dense_ms.

    Args:
        model, dense: on the device; a dense model is measured against another of its kind.
        input_size, batch_size, device, precision, turns, seconds: see ``measure_latency``.
    """
    both = measure_latency({"dense": dense, "model": model}, input_size, batch_size, device, precision, turns, seconds)
    entry = {**asdict(both["model"]), "dense_ms": both["dense"].ms}
    del entry["peak_bytes"]
    return entry


def describe_device(device: torch.device) -> str:
    """Returns 'NVIDIA H200' or 'cpu'.

    Args:
        device: CUDA, or any other.
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Returns the model itself if it is there already, else a copy, without the dense layers that a patched model may keep."""
    index = device.index if device.index is not None or device.type != "cuda" else torch.cuda.current_device()
    if all((t.device.type, t.device.index) == (device.type, index) for t in (*model.parameters(), *model.buffers())):
        return model
    return copy.deepcopy(model, shared_records(model)).to(device)


def _images(model: nn.Module, input_size: tuple[int, int, int], batch_size: int, device: torch.device) -> Tensor:
    """Returns noise in the model's dtype: a GPU runs faster on zeros."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(batch_size, *input_size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
