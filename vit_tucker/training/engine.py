"""The training loop: one optimizer step, one evaluation, and the loop around them."""

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from vit_tucker.config.schema import TrainConfig
from vit_tucker.data.loaders import Batch, Loaders, TrainLoader
from vit_tucker.data.seeding import derive_seed, seed_everything
from vit_tucker.errors import DataError, DivergedError
from vit_tucker.training.metrics import Scores, batch_sums, scores_from_sums
from vit_tucker.training.optim import learning_rate
from vit_tucker.training.run_dir import LOGGER, RunDir
from vit_tucker.training.state import save_checkpoint, save_weights


@dataclass
class Progress:
    """Where a run stands; saved with each checkpoint.

    Attributes:
        epoch: current epoch, from 0.
        step: finished optimizer steps of this epoch.
        global_step: finished optimizer steps in all.
        loss_sum: sum of the step losses of this epoch.
        seconds: training time so far, evaluation apart.
        rows: finished rows of summary.csv.
        best: the row with the best top-1 so far.
    """

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None


@dataclass
class Trainer:
    """All that the loop works on; built by vit_tucker.run.

    Attributes:
        accelerator: device, processes, precision.
        model: prepared model; ``bare`` is the same without wrappers.
        optimizer: prepared optimizer.
        scheduler: timm's, over global steps.
        loss: logits, targets -> scalar mean.
        mixup: timm's, or None.
        ema: timm's, or None.
        config: the recipe.
        seed: of the run.
        run_dir: where results go.
        metadata: strings for the header of saved weights.
        facts: scalars for TensorBoard, written once.
        inspect: scalars of the bare model for TensorBoard, written at each evaluation; None for none.
        progress: where the run stands.
    """

    accelerator: Accelerator
    model: nn.Module
    bare: nn.Module
    optimizer: Any
    scheduler: Scheduler
    loss: nn.Module
    mixup: Mixup | None
    ema: ModelEmaV3 | None
    config: TrainConfig
    seed: int
    run_dir: RunDir
    metadata: dict[str, str]
    facts: dict[str, float]
    progress: Progress
    inspect: Callable[[nn.Module], dict[str, float]] | None = None

    def save(self) -> None:
        """Write a resumable checkpoint (main process)."""
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.run_dir.checkpoints,
                self.bare,
                self.ema.module if self.ema else None,
                getattr(self.optimizer, "optimizer", self.optimizer),
                {**asdict(self.progress), "scaler": self._scaler_state()},
                self.metadata,
                self.config.checkpoint_hist,
            )
        self.accelerator.wait_for_everyone()

    def _scaler_state(self) -> dict[str, Any] | None:
        return self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None


def train_step(trainer: Trainer, micro_batches: list[Batch]) -> Tensor:
    """One optimizer step over this process's micro-batches.

    All randomness of the step follows from (seed, step, process); mixup draws from (seed, step), so that all processes
    and micro-batches mix their mirrored shards alike.

    Args:
        trainer: the run.
        micro_batches: (images (B, channels, height, width), labels (B,)) on the CPU.

    Returns:
        This process's mean loss, detached, scalar.
    """
    t, device = trainer, trainer.accelerator.device
    step, rank = t.progress.global_step, t.accelerator.process_index
    seed_everything(derive_seed(t.seed, step, 2, rank))
    total = torch.zeros((), device=device)
    for number, (batch, labels, _) in enumerate(micro_batches):
        images, targets = batch.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if t.mixup is not None:
            np.random.seed(derive_seed(t.seed, step, 3))  # noqa: NPY002  # timm's mixup draws from the global state
            images, targets = t.mixup(images, targets)
        last = number == len(micro_batches) - 1
        with contextlib.nullcontext() if last else t.accelerator.no_sync(t.model):
            loss = t.loss(t.model(images).float(), targets) / len(micro_batches)
            t.accelerator.backward(loss)
        total += loss.detach()
    if t.config.clip_grad is not None:
        t.accelerator.clip_grad_norm_(t.model.parameters(), t.config.clip_grad)
    t.optimizer.step()
    t.optimizer.zero_grad()
    t.scheduler.step_update(step + 1)
    if t.ema is not None:
        t.ema.update(t.bare, step=step)
    return total


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[Batch], accelerator: Accelerator) -> Scores:
    """Scores of a model over all processes' shares, each image counted once.

    The model is called without its DDP wrapper: processes may have different numbers of batches.

    Args:
        model: unwrapped.
        loader: this process's share.
        accelerator: sums over processes.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    for images, labels, _ in loader:
        images = images.to(accelerator.device, non_blocking=True)
        with accelerator.autocast():
            logits = model(images)
        sums += batch_sums(logits, labels.to(accelerator.device, non_blocking=True))
    model.train(was_training)
    return scores_from_sums(accelerator.reduce(sums, reduction="sum"))


def fit(trainer: Trainer, loaders: Loaders) -> None:
    """Train from where ``trainer.progress`` stands to the last epoch: train, evaluate, save; epoch by epoch.

    Raises:
        DivergedError: the loss became NaN or infinite; says where, nothing bad is saved over the last checkpoint.
    """
    assert loaders.train is not None
    t, progress = trainer, trainer.progress
    writer = (
        SummaryWriter(str(t.run_dir.path), purge_step=progress.global_step + 1)
        if t.accelerator.is_main_process
        else None
    )
    if writer is not None:
        for name, value in t.facts.items():
            writer.add_scalar(name, value, progress.global_step)
    while progress.epoch < t.config.epochs:
        if t.mixup is not None and 0 < t.config.mixup_off_epoch <= progress.epoch:
            t.mixup.mixup_enabled = False
        train_epoch(t, loaders.train, writer)
        progress.epoch, progress.step = progress.epoch + 1, 0
        row = {
            "epoch": progress.epoch,
            "train_loss": progress.loss_sum / loaders.train.steps_per_epoch,
            "eval_loss": None,
            "eval_top1": None,
            "eval_top5": None,
            "lr": learning_rate(t.optimizer),
        }
        progress.loss_sum = 0.0
        if progress.epoch % t.config.eval_interval == 0 or progress.epoch == t.config.epochs:
            row |= evaluate_epoch(t, loaders, writer)
        progress.rows.append(row)
        if t.accelerator.is_main_process:
            t.run_dir.write_summary(progress.rows)
        log_epoch(t, row, loaders.train)
        t.save()
    if writer is not None:
        writer.close()


def train_epoch(trainer: Trainer, loader: TrainLoader, writer: SummaryWriter | None) -> None:
    """The rest of the current epoch, with log points and checkpoints on the way; ``trainer.progress`` moves along."""
    t, progress = trainer, trainer.progress
    t.model.train()
    pending: list[Tensor] = []
    bar = tqdm(
        total=loader.steps_per_epoch,
        initial=progress.step,
        desc=f"epoch {progress.epoch + 1}/{t.config.epochs}",
        disable=None if t.accelerator.is_main_process else True,
        leave=False,
    )
    started, start_step, seconds_before = time.perf_counter(), progress.step, progress.seconds
    for micro_batches in loader.steps(progress.epoch, progress.step):
        pending.append(train_step(t, micro_batches))
        progress.step += 1
        progress.global_step += 1
        bar.update()
        due_save = t.config.checkpoint_steps is not None and progress.global_step % t.config.checkpoint_steps == 0
        due_log = progress.global_step % t.config.log_interval == 0
        if due_save or due_log or progress.step == loader.steps_per_epoch:
            losses = reduced_losses(t, pending)
            progress.loss_sum += sum(losses)
            pending = []
            seconds = time.perf_counter() - started
            progress.seconds = seconds_before + seconds
            images_per_second = (progress.step - start_step) * t.config.global_batch_size / seconds
            bar.set_postfix(loss=f"{losses[-1]:.4f}", img_s=f"{images_per_second:.0f}")
            if writer is not None:
                for offset, loss in enumerate(losses):
                    writer.add_scalar("train/loss", loss, progress.global_step - len(losses) + offset + 1)
                writer.add_scalar("train/lr", learning_rate(t.optimizer), progress.global_step)
                writer.add_scalar("train/images_per_second", images_per_second, progress.global_step)
        if due_save and progress.step < loader.steps_per_epoch:
            t.save()
    bar.close()
    if progress.step != loader.steps_per_epoch:
        raise DataError(
            f"the training data ended after {progress.step} of {loader.steps_per_epoch} steps of epoch {progress.epoch + 1}; "
            "a streamed set needs at least as many shards as processes x data.num_workers, and its true size"
        )


def reduced_losses(trainer: Trainer, pending: list[Tensor]) -> list[float]:
    """Step losses, averaged over processes; stops the run on NaN or infinity."""
    losses = trainer.accelerator.reduce(torch.stack(pending).double(), reduction="mean").tolist()
    for number, loss in enumerate(losses):
        if not np.isfinite(loss):
            step = trainer.progress.global_step - len(losses) + number + 1
            raise DivergedError(
                f"the loss is {loss} at step {step} (epoch {trainer.progress.epoch + 1}, "
                f"lr {learning_rate(trainer.optimizer):.3g}); lower train.lr, or set train.clip_grad or train.mixed_precision"
            )
    return losses


def evaluate_epoch(trainer: Trainer, loaders: Loaders, writer: SummaryWriter | None) -> dict[str, float]:
    """Evaluate model and EMA, keep the best weights.

    Returns:
        Entries of the summary row: eval_loss, eval_top1, eval_top5, and with an EMA eval_ema_top1.
    """
    t, progress = trainer, trainer.progress
    scores = evaluate(t.bare, loaders.eval, t.accelerator)
    if loaders.num_eval is not None and scores.count != loaders.num_eval:
        raise RuntimeError(f"evaluated {scores.count} images of {loaders.num_eval}")
    row = {"eval_loss": scores.loss, "eval_top1": scores.top1, "eval_top5": scores.top5}
    judged = scores.top1
    if t.ema is not None:
        judged = row["eval_ema_top1"] = evaluate(t.ema.module, loaders.eval, t.accelerator).top1
    if progress.best is None or judged > progress.best["top1"]:
        progress.best = {"epoch": progress.epoch, "top1": judged, "top5": scores.top5, "loss": scores.loss}
        if t.accelerator.is_main_process:
            header = {**t.metadata, "epoch": str(progress.epoch), "top1": f"{judged:.4f}"}
            save_weights(t.run_dir.best, t.ema.module if t.ema is not None else t.bare, header)
    if writer is not None:
        for name, value in row.items():
            writer.add_scalar(name.replace("eval_", "eval/", 1), value, progress.global_step)
        for name, value in t.inspect(t.bare).items() if t.inspect is not None else []:
            writer.add_scalar(name, value, progress.global_step)
    return row


def log_epoch(trainer: Trainer, row: dict[str, Any], loader: TrainLoader) -> None:
    """One console line for an epoch."""
    rate = trainer.progress.global_step * trainer.config.global_batch_size / max(trainer.progress.seconds, 1e-9)
    parts = [f"epoch {row['epoch']}/{trainer.config.epochs}", f"loss {row['train_loss']:.4f}"]
    if row["eval_top1"] is not None:
        parts += [f"top-1 {row['eval_top1']:.2f}%", f"top-5 {row['eval_top5']:.2f}%"]
    if row.get("eval_ema_top1") is not None:
        parts.append(f"EMA top-1 {row['eval_ema_top1']:.2f}%")
    LOGGER.info("  ".join([*parts, f"lr {row['lr']:.2e}", f"{rate:.0f} images/s"]))
