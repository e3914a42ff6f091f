"""What a patched model costs beside its dense host: operations, counted; latency, measured."""

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from vit_tucker.analysis.flops import known_flops
from vit_tucker.analysis.latency import measure_latency


def count_cost(model: nn.Module, dense: nn.Module, input_size: tuple[int, int, int]) -> dict[str, Any]:
    """The entry ``cost`` of a run's results.json before anything is measured.

    Args:
        model: patched, or the dense host itself.
        dense: the host before the patch; its structure is enough.
        input_size: (channels, height, width).

    Returns:
        ``flops`` and ``dense_flops``: operations of the forward pass per image, 2 per multiply-add, None if not known;
        ``latency``: None.
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
    """The entry ``latency`` of ``cost``: the model and its dense host in turns.

    Args:
        model, dense: on the device; a dense model is measured against another of its kind.
        input_size, batch_size, device, precision, turns, seconds: see ``measure_latency``.

    Returns:
        device, precision, threads, batch_size, turns; ms and dense_ms, medians per batch; ratio, ratio_low and ratio_high, median
        and quartiles over turns of the model's time to the dense host's.
    """
    both = measure_latency({"dense": dense, "model": model}, input_size, batch_size, device, precision, turns, seconds)
    entry = {**asdict(both["model"]), "dense_ms": both["dense"].ms}
    del entry["peak_bytes"]
    return entry
