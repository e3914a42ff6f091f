"""What can be known of a sweep's runs before any of them starts: what is wrong with them, and what they cost."""

from collections.abc import Sequence

from torch import nn

from vit_tucker.analysis.flops import count_model_flops
from vit_tucker.build import classes_and_channels
from vit_tucker.data.datasets import dataset_info
from vit_tucker.errors import PatchError
from vit_tucker.models import create_host
from vit_tucker.patching.patch import patch, plan
from vit_tucker.patching.probe import input_shape, without_weights
from vit_tucker.sweep.plan import Job

TRAINING = 3
"""Operations of a training step over those of its forward pass: the backward pass has two products for each."""
GPU_FLOPS = 300e12
"""Operations per second that a GPU is expected to reach in training: 30% of an H100's dense bf16 peak of 989e12."""


def host_of(job: Job) -> nn.Module:
    """The dense model of a run, without weights."""
    bare = job.config.model.model_copy(update={"pretrained": False, "checkpoint": None})
    return without_weights(lambda: create_host(bare, *classes_and_channels(job.config)))


def refuse_impossible(jobs: Sequence[Job]) -> None:
    """Plan each cell's patch on its host, without weights.

    Args:
        jobs: the runs; one per cell is looked at. Cells whose ranks are yet to be chosen are left out.

    Raises:
        VitTuckerError: a model that can't be built, or a patch that it doesn't allow; it names the cell.
    """
    hosts: dict[str, nn.Module] = {}
    for job in {job.name: job for job in jobs}.values():
        model, attention = job.config.model, job.config.attention
        key = repr((model.timm_kwargs(), model.name, classes_and_channels(job.config)))
        if key not in hosts:
            hosts[key] = host_of(job)
        if attention is None or attention.rank_rule is not None:
            continue
        try:
            plan(
                hosts[key],
                attention.model_copy(update={"init": "random", "calibration": None}),
                img_size=model.img_size,
            )
        except PatchError as error:
            raise PatchError(f"cell {job.name}: attention: {error}") from None


def training_flops(jobs: Sequence[Job]) -> float | None:
    """Operations of all forward and backward passes of training, evaluation apart; ranks yet to be chosen count as dense.

    Args:
        jobs: the runs; those of one cell cost the same.

    Returns:
        The sum; None if only its files tell how many images a data set has.
    """
    costs: dict[str, float] = {}
    for job in jobs:
        images = job.config.data.num_samples or dataset_info(job.config.data.dataset).num_train
        if images is None:
            return None
        if job.name not in costs:
            model, attention = host_of(job), job.config.attention
            size = input_shape(model, job.config.model.img_size)
            if attention is not None and attention.rank_rule is None:
                patch(model, attention.model_copy(update={"init": "random", "calibration": None}), img_size=size[1:])
            costs[job.name] = float(TRAINING * images * job.config.train.epochs * count_model_flops(model, size))
    return sum(costs[job.name] for job in jobs)


def describe_cost(flops: float | None) -> str:
    """'12.3 EFLOPs to train, about 11 GPU hours at 300 TFLOP/s'"""
    if flops is None:
        return "cost unknown: only the files tell how many images there are"
    power, unit = next((p, u) for p, u in ((1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (0, "")) if flops >= p)
    hours = flops / GPU_FLOPS / 3600
    return f"{flops / power:.3g} {unit} to train, about {hours:.2g} GPU hours at {GPU_FLOPS / 1e12:.0f} TFLOP/s"
