"""What a patched model costs beside its dense host: operations, counted; latency, measured."""

from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import nn

from vit_tucker.analysis.flops import count_model_flops
from vit_tucker.analysis.latency import measure_latency


def run_cost(
    model: nn.Module,
    dense: nn.Module,
    input_size: tuple[int, int, int],
    device: torch.device | str,
    precision: Literal["no", "bf16", "fp16"],
    measure: bool,
    batch_size: int,
    turns: int = 15,
    seconds: float = 0.05,
) -> dict[str, Any]:
    """The entry ``cost`` of a run's results.json.

    Args:
        model: patched; or the dense host itself, whose latency is then measured against its own.
        dense: the host before the patch; on the meta device if nothing is measured.
        input_size: (channels, height, width).
        device, precision, batch_size, turns, seconds: of the measurement, see ``measure_latency``.
        measure: whether latency is measured.

    Returns:
        ``flops`` and ``dense_flops``: operations of the forward pass per image, 2 per multiply-add. ``latency``: None, or device,
        precision, threads, batch_size, turns; ms and dense_ms, medians per batch; ratio, ratio_low and ratio_high, median and
        quartiles over turns of the model's time to the dense host's.
    """
    latency = None
    if measure:
        both = measure_latency(
            {"dense": dense, "model": model}, input_size, batch_size, device, precision, turns, seconds
        )
        latency = {**asdict(both["model"]), "dense_ms": both["dense"].ms}
        del latency["peak_bytes"]
    flops, dense_flops = (count_model_flops(m, input_size) for m in (model, dense))
    return {"flops": flops, "dense_flops": dense_flops, "latency": latency}
