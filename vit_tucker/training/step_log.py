"""Collects the results of a run's steps, on the device until they are averaged over processes."""

import time
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from vit_tucker.training.progress import Progress
from vit_tucker.training.step import StepResult


@dataclass(frozen=True)
class Steps:
    """The results of steps that follow each other, of all processes.

    Attributes:
        first: number of the first one, from 1.
        losses: the mean over processes of each step.
        terms: the same for each term of the loss, by its name; empty where the loss is all that there is.
        norms: gradient norms by step, where they were measured.
    """

    first: int
    losses: list[float]
    terms: dict[str, list[float]] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)


class StepLog:
    """Collects this process's steps until they are averaged, and the training time of the epoch."""

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, Tensor | None]] = []
        self._names: tuple[str, ...] = ()
        self._started = self._before = 0.0

    def begin_epoch(self, progress: Progress) -> None:
        """Starts the clock of an epoch, or of what is left of it."""
        self._started, self._before = time.perf_counter(), progress.seconds

    def add(self, result: StepResult) -> None:
        """Adds a step. Terms that are the loss itself are left out."""
        terms = result.loss.terms if len(result.loss.terms) > 1 else {}
        self._names = tuple(terms)
        self._pending.append((torch.stack([result.loss.total, *terms.values()]), result.norm))

    def average(self, progress: Progress, accelerator: Accelerator) -> Steps:
        """Averages what is pending over processes, and adds it to the progress; every process must call this alike."""
        pending, self._pending = self._pending, []
        stacked = torch.stack([values for values, _ in pending]).double()
        rows = accelerator.reduce(stacked, reduction="mean").tolist()
        progress.seconds = self._before + time.perf_counter() - self._started
        first = progress.global_step - len(rows) + 1
        losses, *columns = (list(column) for column in zip(*rows, strict=True))
        terms = dict(zip(self._names, columns, strict=True))
        progress.add_losses(losses, terms)
        norms = {first + offset: float(norm) for offset, (_, norm) in enumerate(pending) if norm is not None}
        return Steps(first, losses, terms, norms)
