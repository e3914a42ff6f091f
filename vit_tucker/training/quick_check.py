"""A quick check of a whole run before it is trained: two steps, an evaluation batch and a checkpoint, none of which is kept."""

import itertools
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vit_tucker.config.schema import RunConfig
from vit_tucker.data.loaders import Loaders
from vit_tucker.errors import DivergedError, FailedError, StoppedError
from vit_tucker.storage.paths import refuse_unwritable
from vit_tucker.training.engine import train_step
from vit_tucker.training.interrupt import catch_signals
from vit_tucker.training.trainer import Trainer

STEPS = 2
"""The first one starts workers and kernels, so that the last one gives the pace."""


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder beside a run folder, where that would be made, and removes it; elsewhere if none can be made there.

    Raises:
        ConfigError: the run folder can't be written to or be made.
    """
    refuse_unwritable("output_dir", folder, folder=True)
    above = folder.absolute().parent
    while not above.exists():
        above = above.parent
    place = str(above) if os.access(above, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".quick-check-", dir=place, ignore_cleanup_errors=True) as made:
        yield Path(made)


def for_quick_check(config: RunConfig) -> RunConfig:
    """Returns the config without what reads all images before the first step."""
    held = "auto" if config.data.in_memory is True else config.data.in_memory
    return config.model_copy(update={"data": config.data.model_copy(update={"check": False, "in_memory": held})})


def quick_check(trainer: Trainer, loaders: Loaders) -> str:
    """Makes two optimizer steps, evaluates a batch per process, and writes a checkpoint into the trainer's folder.

    Returns:
        One line: all works, with the images or tokens per second of the last step.

    Raises:
        DivergedError: the loss is not finite. DataError: too many bad images. SaveError: the checkpoint can't be written.
        FailedError: the GPU's memory is too small. StoppedError: a signal asked for it.
    """
    try:
        with catch_signals(trainer.signals):
            losses, seconds = make_steps(trainer, loaders)
            count = evaluate_batch(trainer, loaders)
            trainer.save()
    except torch.cuda.OutOfMemoryError:
        recipe, processes = trainer.config, trainer.accelerator.num_processes
        micro_batch = recipe.global_batch_size // (processes * recipe.grad_accum_steps)
        size = f"{micro_batch} {trainer.task.samples}"
        raise FailedError(
            f"quick check: the GPU's memory is too small for {size} at a time: raise train.grad_accum_steps="
            f"{recipe.grad_accum_steps}, or set train.grad_checkpointing=true or train.eval_batch_size"
        ) from None
    task = trainer.task
    rate = trainer.config.global_batch_size * task.units / max(seconds, 1e-9)
    shown = ", ".join(f"{loss:.4f}" for loss in losses)
    return (
        f"quick check: all works: {len(losses)} steps (loss {shown}), {count} evaluation {task.unit}, a checkpoint; "
        f"{rate:,.0f} {task.unit}/s; nothing was kept"
    )


def make_steps(trainer: Trainer, loaders: Loaders) -> tuple[list[float], float]:
    """Makes the optimizer steps of a quick check.

    Returns:
        The loss of each, averaged over processes, and the seconds that the last one took, with the wait for its images.

    Raises:
        DivergedError: a loss is not finite. StoppedError: a signal asked for it. DataError: too many bad images.
    """
    assert loaders.train is not None
    t, progress, losses, seconds = trainer, trainer.progress, list[float](), 0.0
    t.model.train()
    t.log.begin_epoch(progress)
    batches = itertools.chain.from_iterable(map(loaders.train.steps, range(STEPS)))  # an epoch may be a single step
    started = time.perf_counter()
    for micro_batches in itertools.islice(batches, STEPS):
        result = train_step(t, micro_batches)
        progress.finish_step()
        t.log.add(result)
        losses += t.log.average(progress, t.accelerator).losses
        now = time.perf_counter()
        seconds, started = now - started, now
        if not math.isfinite(losses[-1]):
            t.coordinator.agreed = True
            raise DivergedError(
                f"quick check: the loss is {losses[-1]} at step {len(losses)}: lower train.lr, or set train.clip_grad or "
                "train.mixed_precision"
            )
        t.share_faults()
        if any(t.coordinator.gather(t.signals.number)):
            raise StoppedError(f"quick check: stopped after step {len(losses)}; nothing was kept")
    return losses, seconds


@torch.no_grad()
def evaluate_batch(trainer: Trainer, loaders: Loaders) -> int:
    """Evaluates the first batch of each process as at the end of an epoch, and returns the number of images or tokens in all."""
    t, accelerator = trainer, trainer.accelerator
    batch = next(iter(loaders.eval), None)
    t.bare.eval()
    sums = torch.zeros(t.task.num_sums, dtype=torch.float64, device=accelerator.device)
    images, labels = t.task.example(1)[0], None  # of a sharded model all processes are needed, also one without images
    if batch is not None and len(batch.labels):
        images, labels = batch.images, batch.labels
    with accelerator.autocast():
        logits = t.task.logits(t.bare, images.to(accelerator.device))
    if labels is not None:
        sums += t.task.sums(logits, labels.to(accelerator.device))
    return t.task.scores(accelerator.reduce(sums, reduction="sum")).count
