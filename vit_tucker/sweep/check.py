"""Checks a sweep's runs and counts what they cost before any of them starts."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence

from accelerate.state import AcceleratorState
from torch import nn

from vit_tucker.errors import FailedError, PatchError, VitTuckerError
from vit_tucker.run.builders import builder_of
from vit_tucker.run.run import run
from vit_tucker.show.progress_bars import each
from vit_tucker.storage.run_dir import RunDir
from vit_tucker.sweep.plan import Job

TRAINING = 3
"""Operations of a training step over those of its forward pass: the backward pass has two products for each."""
UNITS = ((1e21, "ZFLOPs"), (1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"))
GPU_FLOPS = 300e12
"""Operations per second that a GPU is expected to reach in training: 30% of an H100's dense bf16 peak of 989e12."""


def plan_cells(jobs: Sequence[Job]) -> dict[str, int | None]:
    """Plans each cell's patch on its host, without weights.

    Args:
        jobs: the runs; one per cell is looked at. Cells whose ranks are yet to be chosen count as dense.

    Returns:
        Operations of a forward pass per image or window of tokens, by cell; None of hosts that don't run without values.

    Raises:
        VitTuckerError: a model that can't be built, or a patch that it doesn't allow; it names the cell.
    """
    hosts: dict[str, tuple[nn.Module, int | None]] = {}
    counted: dict[str, int | None] = {}  # cells that differ in their start alone have one structure
    flops: dict[str, int | None] = {}
    for job in each({job.name: job for job in jobs}.values(), "checking", "cells"):
        attention, builder = job.config.attention, builder_of(job.config)
        key, structure = builder.host(job.config)
        if key not in hosts:
            host = structure()
            hosts[key] = host, builder.operations(job.config, host, None, None)
        host, dense = hosts[key]
        flops[job.name] = dense
        if attention is None or attention.rank_rule is not None:
            continue
        bare = attention.unconverted()
        if (patched := f"{key}{bare!r}") not in counted:
            try:
                counted[patched] = builder.operations(job.config, host, bare, dense)
            except PatchError as error:
                raise PatchError(f"cell {job.name}: attention: {error}") from None
        flops[job.name] = counted[patched]
    return flops


def notes_of(jobs: Sequence[Job]) -> list[str]:
    """Returns the notes on the configs of the runs, each once with the cells that it is about."""
    cells: dict[str, dict[str, None]] = {}
    for job in jobs:
        for note in job.notes:
            cells.setdefault(note, {})[job.name] = None
    return [f"{note} ({', '.join(names)})" for note, names in cells.items()]


def quick_checks(jobs: Sequence[Job]) -> Iterator[tuple[str, str | Exception]]:
    """Yields, for one run of each cell, the line of its quick check, or why it does not work.

    A cell whose start is not trained yet starts from a dense model without trained weights.
    """
    for job in [next(job for job in jobs if job.name == name) for name in dict.fromkeys(job.name for job in jobs)]:
        config = job.config
        if job.after is not None and not RunDir(job.after.folder).begun:
            config = config.model_copy(update={"model": config.model.model_copy(update={"checkpoint": None})})
        AcceleratorState._reset_state(reset_partial_state=True)  # cells may differ in precision
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                line: str | Exception = run(config, quick_check=True)["quick_check"]
        except (VitTuckerError, FailedError) as error:
            line = error
        yield job.name, line


def describe_cost(jobs: Sequence[Job], flops: Mapping[str, int | None]) -> str:
    """Returns what training costs, without evaluation: '12.3 EFLOPs to train, about 11 GPU hours at 300 TFLOP/s'.

    Args:
        jobs: the runs.
        flops: see ``plan_cells``; that of a host may be unknown, and so may be the number of images.
    """
    total = 0
    for job in jobs:
        images = builder_of(job.config).samples(job.config)
        operations = flops[job.name]
        if images is None or operations is None:
            return "cost unknown: the number of images or the model's operations"
        total += TRAINING * images * job.config.train.epochs * operations
    power, unit = next((pair for pair in UNITS if total >= pair[0]), UNITS[-1])
    hours = total / GPU_FLOPS / 3600
    shown = f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
    expected = f", about {shown} GPU hours at {GPU_FLOPS / 1e12:.0f} TFLOP/s" if hours >= 0.1 else ""
    return f"{total / power:,.3g} {unit} to train{expected}"
