"""Throughput of models side by side, in turns, under the column names of timm's benchmark script."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vit_tucker.analysis.flops import known_flops
from vit_tucker.analysis.interleaved import PRECISIONS, compare_turns, times_in_turns
from vit_tucker.analysis.latency import Latency, measure_latency
from vit_tucker.errors import ConfigError
from vit_tucker.hosts.find import find_attention


def bench_models(
    models: Mapping[str, nn.Module],
    input_size: tuple[int, int, int],
    batch_size: int,
    device: torch.device,
    precision: str = "no",
    turns: int = 10,
    seconds: float = 0.2,
    training: bool = False,
) -> list[dict[str, Any]]:
    """Time the models, each against the first in the same turn.

    Args:
        models: by name; with ``training`` their weights change, and they go to the device.
        input_size: (channels, height, width).
        batch_size: images per pass.
        device, precision, turns, seconds: see ``measure_latency``.
        training: also training steps: forward pass, cross-entropy, backward pass, a step of SGD.

    Returns:
        A row per model under timm's names: infer_samples_per_sec, infer_step_time (milliseconds), infer_batch_size,
        infer_img_size, infer_gmacs, param_count, train_samples_per_sec, train_step_time, ...; and attention_params, infer_speedup
        (the first model's time over this one's in the same turn: median and quartiles), train_speedup. Times and images per
        second of the other models are the first's median by these ratios, see ``turns.Paired``.

    Raises:
        ConfigError: see ``measure_latency``; a model without classes can't be trained.
    """
    if training and (bare := [name for name, model in models.items() if getattr(model, "num_classes", 0) < 1]):
        raise ConfigError(f"{bare[0]}: has no classifier to train; leave --train out")
    latencies = measure_latency(models, input_size, batch_size, device, precision, turns, seconds)
    rows = {
        name: inference_columns(name, model, latencies[name], input_size, batch_size) for name, model in models.items()
    }
    if training:
        steps = {
            name: training_step(model, input_size, batch_size, device, precision) for name, model in models.items()
        }
        times = times_in_turns(steps, device, turns, seconds)
        first = times[next(iter(times))]
        for name, row in rows.items():
            row |= training_columns(first, times[name], input_size, batch_size)
    return list(rows.values())


def inference_columns(
    name: str, model: nn.Module, latency: Latency, input_size: tuple[int, int, int], batch_size: int
) -> dict[str, Any]:
    """What a row says of the model and its forward pass."""
    flops = known_flops(model, input_size)
    return {
        "model": name,
        "infer_samples_per_sec": round(1e3 * batch_size / latency.ms, 2),
        "infer_step_time": round(latency.ms, 3),
        "infer_batch_size": batch_size,
        "infer_img_size": input_size[-1],
        "infer_gmacs": None if flops is None else round(flops / 2e9, 3),
        "param_count": round(sum(p.numel() for p in model.parameters()) / 1e6, 3),
        "attention_params": count_attention(model),
        "infer_speedup": round(1 / latency.ratio, 3),
        "infer_speedup_low": round(1 / latency.ratio_high, 3),
        "infer_speedup_high": round(1 / latency.ratio_low, 3),
        "infer_peak_mb": round(latency.peak_bytes / 1e6, 1),
    }


def training_columns(
    first: list[float], own: list[float], input_size: tuple[int, int, int], batch_size: int
) -> dict[str, Any]:
    """What a row says of the training steps, from seconds in each turn of the first model and of this one."""
    paired = compare_turns(first, own)
    return {
        "train_samples_per_sec": round(batch_size / paired.seconds, 2),
        "train_step_time": round(1e3 * paired.seconds, 3),
        "train_batch_size": batch_size,
        "train_img_size": input_size[-1],
        "train_speedup": round(1 / paired.ratio, 3),
        "train_speedup_low": round(1 / paired.ratio_high, 3),
        "train_speedup_high": round(1 / paired.ratio_low, 3),
    }


def training_step(
    model: nn.Module, input_size: tuple[int, int, int], batch_size: int, device: torch.device, precision: str
) -> Callable[[], None]:
    """One training step on noise, as a call. The model goes to the device."""
    model.to(device).train()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, *input_size, generator=generator).to(device)
    classes: Any = model.num_classes
    labels = torch.randint(classes, (batch_size,), generator=generator).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    autocast = torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "no")

    def step() -> None:
        with autocast:
            output = model(images)
            output = output[0] if isinstance(output, tuple) else output  # of a distilled model
            loss = F.cross_entropy(output.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def count_attention(model: nn.Module) -> int:
    """Parameters of all attention layers."""
    return sum(p.numel() for p in {p for m in find_attention(model).values() for p in m.parameters()})
