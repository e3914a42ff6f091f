"""Throughput of models side by side, in turns, under the column names of timm's benchmark script."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vit_tucker.analysis.flops import known_flops
from vit_tucker.analysis.interleaved import PRECISIONS, Paired, compare_turns, times_in_turns
from vit_tucker.analysis.latency import Latency, measure_latency
from vit_tucker.checkpoint.host_model import count_parameters
from vit_tucker.errors import ConfigError


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
    """Times the models, each against the first in the same turn.

    Args:
        models: by name; with ``training`` their weights change, and they go to the device.
        input_size, batch_size, device, precision, turns, seconds: see ``measure_latency``.
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
    rows = {name: inference_columns(name, model, latencies[name], input_size) for name, model in models.items()}
    if training:
        steps = {name: training_step(model, input_size, batch_size, device, precision)
                 for name, model in models.items()}  # fmt: skip
        times = times_in_turns(steps, device, turns, seconds)
        first = times[next(iter(times))]
        for name, row in rows.items():
            paired = compare_turns(first, times[name])
            row |= time_columns("train", paired.seconds, batch_size, input_size) | speedup_columns("train", paired)
    return list(rows.values())


def inference_columns(
    name: str, model: nn.Module, latency: Latency, input_size: tuple[int, int, int]
) -> dict[str, Any]:
    """Returns the columns of a row for the model and its forward pass.

    Args:
        name: of the model.
        model: on any device.
        latency: as measured.
        input_size: (channels, height, width).
    """
    flops = known_flops(model, input_size)
    params, attention_params = count_parameters(model)
    return {
        "model": name,
        **time_columns("infer", latency.ms / 1e3, latency.batch_size, input_size),
        "infer_gmacs": None if flops is None else round(flops / 2e9, 3),
        "param_count": round(params / 1e6, 3),
        "attention_params": attention_params,
        **speedup_columns("infer", latency),
        "infer_peak_mb": round(latency.peak_bytes / 1e6, 1),
    }


def time_columns(kind: str, seconds: float, batch_size: int, input_size: tuple[int, int, int]) -> dict[str, Any]:
    """Returns the columns of a row for the time of a batch.

    Args:
        kind: "infer" or "train".
        seconds: of a batch.
        batch_size: images.
        input_size: (channels, height, width).
    """
    columns = {"samples_per_sec": round(batch_size / seconds, 2), "step_time": round(1e3 * seconds, 3)}
    columns |= {"batch_size": batch_size, "img_size": input_size[-1]}
    return {f"{kind}_{name}": value for name, value in columns.items()}


def speedup_columns(kind: str, times: Latency | Paired) -> dict[str, Any]:
    """Returns the columns of a row for the speed against the first model; ``kind`` is "infer" or "train"."""
    ratios = {"": times.ratio, "_low": times.ratio_high, "_high": times.ratio_low}
    return {f"{kind}_speedup{end}": round(1 / ratio, 3) for end, ratio in ratios.items()}


def training_step(
    model: nn.Module, input_size: tuple[int, int, int], batch_size: int, device: torch.device, precision: str
) -> Callable[[], None]:
    """Returns a function that makes one training step on noise.

    Args:
        model: moved to the device, in training mode.
        input_size: (channels, height, width).
        batch_size: images.
        device: where it runs.
        precision: "no", "fp16" or "bf16".
    """
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
