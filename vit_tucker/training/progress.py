"""Defines how far a run has come, as it is saved with each checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """The epoch, step and scores that a run has reached; saved with each checkpoint.

    Attributes:
        epoch: finished epochs, their evaluation included; the current one's number from 0.
        step: finished optimizer steps of the current epoch.
        global_step: finished optimizer steps in all.
        loss_sum: sum of the step losses of the current epoch.
        term_sums: the same for each term of the loss, and over how many steps; empty where the loss is all that there is.
        seconds: training time so far, evaluation apart.
        rows: finished rows of summary.csv.
        best: epoch, loss and measures (top1, top5; perplexity, bits_per_byte) of the best weights so far.
        processes: how many trained it last.
        steps_per_epoch: of the config that trained it last.
        faults: one line for each image that could not be read.
    """

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    loss_sum: float = 0.0
    term_sums: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    processes: int = 1
    steps_per_epoch: int = 0
    faults: list[str] = field(default_factory=list)

    def finish_step(self) -> None:
        """Counts one more optimizer step."""
        self.step += 1
        self.global_step += 1

    def add_losses(self, losses: list[float], terms: Mapping[str, list[float]]) -> None:
        """Adds step losses and their terms one by one: a stop in between must not change the rounding of the sum."""
        for loss in losses:
            self.loss_sum += loss
        for name, values in terms.items():
            for value in values:
                before, steps = self.term_sums.get(name, (0.0, 0))
                self.term_sums[name] = [before + value, steps + 1]

    def term_means(self) -> dict[str, float]:
        """Returns the mean of each term of the loss over the current epoch's steps."""
        return {name: total / steps for name, (total, steps) in self.term_sums.items()}

    def finish_epoch(self, row: dict[str, Any]) -> None:
        """Counts the current epoch as trained and evaluated."""
        self.rows.append(row)
        self.epoch, self.step, self.loss_sum, self.term_sums = self.epoch + 1, 0, 0.0, {}

    def fit_to(self, steps_per_epoch: int) -> bool:
        """Adapts to another number of steps per epoch (a changed batch size): the same share of the epoch is done.

        Returns:
            Whether anything had to change.
        """
        before, self.steps_per_epoch = self.steps_per_epoch, steps_per_epoch
        if before in (0, steps_per_epoch):
            return False
        step = self.step * steps_per_epoch // before
        self.loss_sum = self.loss_sum * step / self.step if self.step else 0.0
        self.step, self.global_step = step, self.epoch * steps_per_epoch + step
        return True
