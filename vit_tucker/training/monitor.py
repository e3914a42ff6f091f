"""Shows a run's progress: console lines, one progress bar, TensorBoard and other trackers, and the times measured for them."""

import resource
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from vit_tucker.storage.run_dir import LOGGER
from vit_tucker.training.events import Events
from vit_tucker.training.optim import learning_rate
from vit_tucker.training.progress import Progress
from vit_tucker.training.step_log import Steps
from vit_tucker.training.trackers import Trackers
from vit_tucker.training.trainer import Trainer

T = TypeVar("T")


class NullMonitor:
    """Receives the events of a run and shows none of them: the base of monitors. A run is the same with any."""

    def begin_epoch(self, progress: Progress) -> None:
        """Notes that an epoch begins, or what is left of it.

        Args:
            progress: state of the run.
        """

    def timed(self, batches: Iterable[T]) -> Iterable[T]:
        """Yields the same items; the time that they are waited for may be counted.

        Args:
            batches: of the epoch.
        """
        return batches

    def stepped(self) -> None:
        """Notes that a step is done."""

    def show_steps(self, steps: Steps, progress: Progress, optimizer: Any) -> None:
        """Receives losses and gradient norms of the steps since the last time; every process calls this alike.

        Args:
            steps: losses and norms, averaged over processes.
            progress: state of the run.
            optimizer: whose groups have the learning rates.
        """

    def begin_evaluation(self) -> None:
        """Notes that the steps of the epoch are done."""

    def evaluated(
        self, row: dict[str, Any], extra: dict[str, float], progress: Progress, first: Sequence[tuple[Tensor, ...]] = ()
    ) -> None:
        """Receives scores of the model, other scalars of it, and images, labels and logits of one batch.

        Args:
            row: of summary.csv, with scores in percent.
            extra: other scalars of the model by name.
            progress: state of the run.
            first: images (B, channels, height, width), labels (B,) and logits (B, classes) of one batch; may be empty.
        """

    def end_epoch(self, progress: Progress) -> None:
        """Notes that an epoch is trained and evaluated.

        Args:
            progress: state of the run.
        """

    def close(self) -> None:
        """Ends the monitor when the run has ended, whether well or not."""


class Monitor(NullMonitor):
    """Shows on the console, in TensorBoard and in other trackers; measures on all processes, writes on the first.

    Args:
        trainer: of the run, at the step that it goes on from; TensorBoard drops what an earlier try wrote after it.
        steps_per_epoch: optimizer steps.
        facts: scalars to write once.
        text: the resolved config.
        trackers: beside TensorBoard.
        hyperparameters: of TensorBoard's table, by name.
    """

    def __init__(
        self,
        trainer: Trainer,
        steps_per_epoch: int,
        facts: dict[str, float],
        text: str,
        trackers: Trackers,
        hyperparameters: Mapping[str, float | str | bool],
    ) -> None:
        self.config, self.steps_per_epoch = trainer.config, steps_per_epoch
        self.main, start_step = trainer.accelerator.is_main_process, trainer.progress.global_step
        self.events = Events(trainer.run_dir.path, start_step + 1) if self.main else None
        self.groups, self.trackers, self.task = trainer.groups, trackers, trainer.task
        self.bar = tqdm(disable=True)
        self.eval_seconds, self.step_seconds, self.warm = 0.0, 0.0, False
        self.scalars(facts, start_step)
        if self.events is not None:
            indented = "\n".join(f"    {line}" for line in text.splitlines())
            self.events.text("config", indented, start_step)
            self.events.hyperparameters(hyperparameters)

    def begin_epoch(self, progress: Progress) -> None:
        """Starts the clock and the bar of an epoch, or of what is left of it."""
        self.bar = tqdm(
            total=self.steps_per_epoch,
            initial=progress.step,
            desc=f"epoch {progress.epoch + 1}/{self.config.epochs}",
            disable=None if self.main else True,
            leave=False,
        )
        self.started = self.paced_from = time.perf_counter()
        self.waited, self.steps = 0.0, 0

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields the same items; the time that they are waited for is counted."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - before
            yield item

    def stepped(self) -> None:
        """Counts a step that is done."""
        self.steps += 1
        self.bar.update()
        if not self.warm and self.steps < self.steps_per_epoch:  # the run's first step starts workers and kernels
            self.warm, self.paced_from, self.waited, self.steps = True, time.perf_counter(), 0.0, 0

    def show_steps(self, steps: Steps, progress: Progress, optimizer: Any) -> None:
        """Shows losses and gradient norms of the steps since the last time, and the pace."""
        now = time.perf_counter()
        self.step_seconds = (now - self.paced_from) / max(self.steps, 1)
        rate, unit = self.rate(), self.task.unit
        pace = {"loss": f"{steps.losses[-1]:.4f}", f"{unit}_s": f"{rate:.0f}", "wait": f"{self.wait_share():.0%}"}
        self.bar.set_postfix(pace)
        for offset, loss in enumerate(steps.losses):
            values = {"train/loss": loss} | {
                f"train/loss_{name}": column[offset] for name, column in steps.terms.items()
            }
            if (step := steps.first + offset) in steps.norms:
                values["train/grad_norm"] = steps.norms[step]
            self.scalars(values, step)
        values = {
            f"train/{unit}_per_second": rate,
            "train/data_wait_share": self.wait_share(),
            "train/memory_gb": memory_bytes() / 1e9,
        }
        self.scalars({**values, **self.learning_rates(optimizer)}, progress.global_step)

    def rate(self) -> float:
        """Returns the images or tokens per second at the pace of the last steps."""
        return self.config.global_batch_size * self.task.units / max(self.step_seconds, 1e-9)

    def wait_share(self) -> float:
        """Returns the share of the epoch's time so far that was spent waiting for data."""
        return self.waited / max(time.perf_counter() - self.paced_from, 1e-9)

    def begin_evaluation(self) -> None:
        """Ends the bar, and starts the clock of the evaluation."""
        self.bar.close()
        self.share, self.started = self.wait_share(), time.perf_counter()

    def evaluated(
        self, row: dict[str, Any], extra: dict[str, float], progress: Progress, first: Sequence[tuple[Tensor, ...]] = ()
    ) -> None:
        """Writes the scores, other scalars, and a picture of some predictions."""
        self.eval_seconds = time.perf_counter() - self.started
        scores = {k.replace("eval_", "eval/", 1): v for k, v in row.items() if k.startswith("eval_")}
        decides = self.task.measures[0].name
        best = {} if progress.best is None else {f"best/{decides}": progress.best[decides]}
        self.scalars({**scores, **best, **extra}, progress.global_step)
        if self.events is not None and first:
            self.events.image("eval/predictions", self.task.picture(*first[0]), progress.global_step)

    def end_epoch(self, progress: Progress) -> None:
        """Prints a console line for an epoch."""
        if not self.main:
            return
        if self.events is not None and progress.epoch == self.config.epochs:
            self.events.hyperparameters({}, finished=True)
        row = progress.rows[-1]
        parts = [f"epoch {row['epoch']}/{self.config.epochs}", f"loss {row['train_loss']:.4f}"]
        measures = self.task.measures
        parts += [measure.text(row[measure.column]) for measure in measures if row[measure.column] is not None]
        averaged = row.get(f"eval_ema_{measures[0].name}")
        if averaged is not None:
            parts.append(f"EMA {measures[0].text(averaged)}")
        parts.append(f"lr {row['lr']:.2e}")
        if self.steps:
            parts += [f"{self.rate():,.0f} {self.task.unit}/s", f"data wait {self.share:.0%}"]
        parts.append(f"{memory_bytes() / 1e9:.1f} GB")
        if progress.epoch < self.config.epochs and self.step_seconds:
            parts.append(f"{clock(self.seconds_left(progress))} left")
        LOGGER.info("  ".join(parts))

    def seconds_left(self, progress: Progress) -> float:
        """Returns the seconds that training and evaluation still need, at the pace of the last epoch."""
        epochs = self.config.epochs - progress.epoch
        evaluations = self.config.epochs // self.config.eval_interval - progress.epoch // self.config.eval_interval
        return epochs * self.steps_per_epoch * self.step_seconds + evaluations * self.eval_seconds

    def learning_rates(self, optimizer: Any) -> dict[str, float]:
        """Returns the learning rate, and that of each group of layers where they differ."""
        rates = {"train/lr": learning_rate(optimizer)}
        if any(group.lr_scale != 1 for group in self.groups):
            for number, (group, now) in enumerate(zip(self.groups, optimizer.param_groups, strict=True)):
                rates[f"lr/{number:02d} {group.layer} {'' if group.weight_decay else 'un'}decayed"] = now["lr"]
        return rates

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Writes scalars, on the main process."""
        if self.events is not None:
            for name, value in values.items():
                self.events.scalar(name, value, step)
        self.trackers.log(values, step)

    def close(self) -> None:
        """Writes what is still buffered."""
        self.bar.close()
        if self.events is not None:
            self.events.close()
        self.trackers.finish()


def memory_bytes() -> int:
    """Returns the most memory that this process had: of the GPU, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def clock(seconds: float) -> str:
    """Formats seconds: 3725 -> '1:02:05'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
