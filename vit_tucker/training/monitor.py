"""What a run shows: console lines, one progress bar, TensorBoard and other trackers; and the times that it measures for them."""

import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from vit_tucker.config.schema import TrainConfig
from vit_tucker.storage.run_dir import LOGGER, RunDir
from vit_tucker.training.events import Events
from vit_tucker.training.optim import Group, learning_rate
from vit_tucker.training.pictures import prediction_figure
from vit_tucker.training.progress import Progress
from vit_tucker.training.trackers import Trackers

T = TypeVar("T")


class Monitor:
    """Measures on all processes, shows and writes on the first.

    Args:
        accelerator: to average over processes.
        run_dir: where TensorBoard's events go.
        config: the recipe.
        steps_per_epoch: optimizer steps.
        start_step: global step that the run goes on from; TensorBoard drops what an earlier try wrote after it.
        facts: scalars to write once.
        text: the resolved config.
        groups: the optimizer's groups.
        trackers: beside TensorBoard; None for none.
        normalisation: mean and std of the images; None to show no pictures.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run_dir: RunDir,
        config: TrainConfig,
        steps_per_epoch: int,
        start_step: int,
        facts: dict[str, float],
        text: str = "",
        groups: Sequence[Group] = (),
        trackers: Trackers | None = None,
        normalisation: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        self.accelerator, self.config, self.steps_per_epoch = accelerator, config, steps_per_epoch
        self.main = accelerator.is_main_process
        self.events = Events(run_dir.path, start_step + 1) if self.main else None
        self.run_dir, self.groups, self.trackers, self.normalisation = run_dir, groups, trackers, normalisation
        self.pending: list[tuple[Tensor, Tensor | None]] = []
        self.bar = tqdm(disable=True)
        self.eval_seconds = 0.0
        self.step_seconds = 0.0
        self.warm = False
        self.scalars(facts, start_step)
        if self.events is not None:
            indented = "\n".join(f"    {line}" for line in text.splitlines())
            self.events.text("config", indented, start_step)

    def begin_epoch(self, progress: Progress) -> None:
        """Start the clock and the bar of an epoch, or of what is left of it."""
        self.bar = tqdm(
            total=self.steps_per_epoch,
            initial=progress.step,
            desc=f"epoch {progress.epoch + 1}/{self.config.epochs}",
            disable=None if self.main else True,
            leave=False,
        )
        self.started = self.paced_from = time.perf_counter()
        self.waited, self.steps = 0.0, 0
        self.seconds_before = progress.seconds

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The same items; the time that they are waited for is counted."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - before
            yield item

    def due(self, global_step: int) -> bool:
        """Whether losses are logged after this step."""
        return global_step % self.config.log_interval == 0

    def add(self, loss: Tensor, norm: Tensor | None) -> None:
        """One step is done: its loss, and its gradient norm if it was measured."""
        self.pending.append((loss, norm))
        self.steps += 1
        self.bar.update()
        if not self.warm and self.steps < self.steps_per_epoch:  # the run's first step starts workers and kernels
            self.warm, self.paced_from, self.waited, self.steps = True, time.perf_counter(), 0.0, 0

    def flush(self, progress: Progress, optimizer: Any) -> tuple[list[float], list[float]]:
        """Log the steps since the last time; every process must call this alike.

        Returns:
            Their losses, each the mean over processes; and the gradient norms that were measured.
        """
        if not self.pending:
            return [], []
        pending, self.pending = self.pending, []
        stacked = torch.stack([loss for loss, _ in pending]).double()
        losses = self.accelerator.reduce(stacked, reduction="mean").tolist()
        now = time.perf_counter()
        progress.seconds = self.seconds_before + now - self.started
        self.step_seconds = (now - self.paced_from) / max(self.steps, 1)
        rate = self.config.global_batch_size / max(self.step_seconds, 1e-9)
        self.bar.set_postfix(loss=f"{losses[-1]:.4f}", img_s=f"{rate:.0f}", wait=f"{self.wait_share():.0%}")
        first = progress.global_step - len(losses) + 1
        norms = {first + offset: float(norm) for offset, (_, norm) in enumerate(pending) if norm is not None}
        for step, loss in enumerate(losses, first):
            self.scalars({"train/loss": loss} | ({"train/grad_norm": norms[step]} if step in norms else {}), step)
        values = {
            "train/images_per_second": rate,
            "train/data_wait_share": self.wait_share(),
            "train/memory_gb": memory_bytes() / 1e9,
        }
        self.scalars({**values, **self.learning_rates(optimizer)}, progress.global_step)
        return losses, list(norms.values())

    def wait_share(self) -> float:
        """Share of the epoch's time so far that was spent waiting for data."""
        return self.waited / max(time.perf_counter() - self.paced_from, 1e-9)

    def begin_evaluation(self) -> None:
        """The steps of the epoch are done."""
        self.bar.close()
        self.share, self.started = self.wait_share(), time.perf_counter()

    def evaluated(
        self, row: dict[str, Any], extra: dict[str, float], progress: Progress, first: Sequence[tuple[Tensor, ...]] = ()
    ) -> None:
        """Scores of the model, what else is known of it, and what it says of some images."""
        self.eval_seconds = time.perf_counter() - self.started
        scores = {k.replace("eval_", "eval/", 1): v for k, v in row.items() if k.startswith("eval_")}
        self.scalars({**scores, **extra}, progress.global_step)
        if self.events is not None and self.normalisation is not None and first:
            images, labels, logits = first[0]
            mean, std = self.normalisation
            picture = prediction_figure(images, labels, logits, mean, std)
            self.events.image("eval/predictions", picture, progress.global_step)

    def end_epoch(self, progress: Progress) -> None:
        """summary.csv, and one console line for an epoch."""
        if not self.main:
            return
        row = progress.rows[-1]
        self.run_dir.write_summary(progress.rows)
        parts = [f"epoch {row['epoch']}/{self.config.epochs}", f"loss {row['train_loss']:.4f}"]
        if row["eval_top1"] is not None:
            parts += [f"top-1 {row['eval_top1']:.2f}%", f"top-5 {row['eval_top5']:.2f}%"]
        if row.get("eval_ema_top1") is not None:
            parts.append(f"EMA top-1 {row['eval_ema_top1']:.2f}%")
        parts.append(f"lr {row['lr']:.2e}")
        if self.steps:
            rate = self.config.global_batch_size / max(self.step_seconds, 1e-9)
            parts += [f"{rate:,.0f} images/s", f"data wait {self.share:.0%}"]
        parts.append(f"{memory_bytes() / 1e9:.1f} GB")
        if progress.epoch < self.config.epochs and self.step_seconds:
            parts.append(f"{clock(self.seconds_left(progress))} left")
        LOGGER.info("  ".join(parts))

    def seconds_left(self, progress: Progress) -> float:
        """Of training and evaluation, at the pace of the last epoch."""
        epochs = self.config.epochs - progress.epoch
        evaluations = self.config.epochs // self.config.eval_interval - progress.epoch // self.config.eval_interval
        return epochs * self.steps_per_epoch * self.step_seconds + evaluations * self.eval_seconds

    def learning_rates(self, optimizer: Any) -> dict[str, float]:
        """The learning rate, and that of each group of layers where they differ."""
        rates = {"train/lr": learning_rate(optimizer)}
        if any(group.lr_scale != 1 for group in self.groups):
            for number, (group, now) in enumerate(zip(self.groups, optimizer.param_groups, strict=True)):
                rates[f"lr/{number:02d} {group.layer} {'' if group.weight_decay else 'un'}decayed"] = now["lr"]
        return rates

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write scalars, on the main process."""
        if self.events is not None:
            for name, value in values.items():
                self.events.scalar(name, value, step)
        if self.trackers is not None:
            self.trackers.log(values, step)

    def close(self) -> None:
        """Write what is still held."""
        self.bar.close()
        if self.events is not None:
            self.events.close()
        if self.trackers is not None:
            self.trackers.finish()


def memory_bytes() -> int:
    """Most memory that this process had: of the GPU, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def clock(seconds: float) -> str:
    """3725 -> '1:02:05'"""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
