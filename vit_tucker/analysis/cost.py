"""What a patched model costs beside its dense host: operations, counted; latency, measured."""

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from vit_tucker.analysis.flops import known_flops
from vit_tucker.analysis.latency import measure_latency


def count_cost(model: nn.Module, dense: nn.Module, input_size: tuple[int, int, int]) -> dict[str, Any]:
    """Returns the entry ``cost`` of a run's results.json before anything is measured: operations per image, see ``known_flops``.

    Args:
        model: patched, or the dense host itself.
        dense: the host before the patch; its structure is enough.
        input_size: (channels, height, width).
    """
    return {"flops": known_flops(model, input_size), "dense_flops": known_flops(dense, input_size), "latency": None}


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
