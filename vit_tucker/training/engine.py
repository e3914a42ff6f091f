"""The training loop: one optimizer step, one evaluation, and the loop around them."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vit_tucker.data.loaders import Batch, EvalLoader, Loaders, TrainLoader
from vit_tucker.data.seeding import derive_seed, seed_everything
from vit_tucker.errors import DataError
from vit_tucker.storage.weights import is_sharded, whole
from vit_tucker.training.interrupt import catch_signals
from vit_tucker.training.metrics import Scores, batch_sums, scores_from_sums
from vit_tucker.training.monitor import Monitor
from vit_tucker.training.optim import gradient_norm, learning_rate
from vit_tucker.training.peers import Peers
from vit_tucker.training.trainer import Trainer


def fit(trainer: Trainer, loaders: Loaders, monitor: Monitor) -> None:
    """Train from where ``trainer.progress`` stands to the last epoch: train, evaluate, save; epoch by epoch.

    Raises:
        DivergedError: the loss became NaN or infinite; the state is saved for inspection, no checkpoint is made of it.
        StoppedError: a signal asked for it; the state is saved, the same command continues.
        SaveError: a checkpoint can't be written; those before it are intact.
        DataError: more unreadable images than allowed, or fewer images than promised.
    """
    assert loaders.train is not None
    t, progress, config, data = trainer, trainer.progress, trainer.config, loaders.train
    with catch_signals(t.signals):
        while progress.epoch < config.epochs:
            t.model.train()
            if t.mixup is not None and 0 < config.mixup_off_epoch <= progress.epoch:
                t.mixup.mixup_enabled = False
            monitor.begin_epoch(progress)
            for micro_batches in monitor.timed(data.steps(progress.epoch, progress.step)):
                last = progress.step + 1 == data.steps_per_epoch
                save_due = config.saves_after(progress.global_step + 1) and not last
                flush_due = save_due or last or monitor.due(progress.global_step + 1)
                loss, norm = train_step(t, micro_batches, measure=flush_due)
                progress.finish_step()
                monitor.add(loss, norm)
                verdict = t.peers.vote(t.signals.number, not t.is_finite(loss, norm), t.has_new_faults())
                if flush_due or verdict.signal or verdict.diverged:
                    losses, norms = monitor.flush(progress, t.optimizer)
                    progress.add_losses(losses)
                    if verdict.diverged or not t.all_finite(losses, norms):
                        t.fail_diverged(losses)
                if verdict.faults:
                    t.share_faults()
                if save_due:
                    t.save()
                t.heed(verdict)
            refuse_short_epoch(data, progress.step, progress.epoch)
            row = finish_epoch(t, loaders, monitor)
            progress.finish_epoch(row)
            monitor.end_epoch(progress)
            if progress.epoch % config.checkpoint_epochs == 0 or progress.epoch == config.epochs:
                t.save()


def train_step(trainer: Trainer, micro_batches: list[Batch], measure: bool = False) -> tuple[Tensor, Tensor | None]:
    """One optimizer step over this process's micro-batches.

    All randomness of the step follows from (seed, step, process); mixup draws from (seed, step), so that all processes
    and micro-batches mix their mirrored shards alike.

    Args:
        trainer: the run.
        micro_batches: images (B, channels, height, width) and labels (B,), on the CPU.
        measure: give the gradient norm even if nothing is clipped by it.

    Returns:
        This process's mean loss, and the norm of all processes' gradient (None if not measured); detached scalars.
    """
    t, device = trainer, trainer.accelerator.device
    step, rank = t.progress.global_step, t.accelerator.process_index
    seed_everything(derive_seed(t.seed, step, 2, rank))
    total, norm = torch.zeros((), device=device), None
    for number, (batch, labels, _) in enumerate(micro_batches):
        images, targets = batch.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if t.mixup is not None:
            np.random.seed(derive_seed(t.seed, step, 3))  # noqa: NPY002  # timm's mixup draws from the global state
            images, targets = t.mixup(images, targets)
        last = number == len(micro_batches) - 1
        with contextlib.nullcontext() if last else t.accelerator.no_sync(t.model):
            loss = batch_loss(t, images, targets) / len(micro_batches)
            t.accelerator.backward(loss)
        total += loss.detach()
    if t.config.clip_grad is not None:
        norm = t.accelerator.clip_grad_norm_(t.model.parameters(), t.config.clip_grad)
    elif measure:
        t.accelerator.unscale_gradients()
        norm = gradient_norm(t.model)
    t.optimizer.step()
    t.optimizer.zero_grad()
    t.scheduler.step_update(step + 1)
    if t.ema is not None:
        t.ema.update(t.bare, step=step)
    return total, None if norm is None else whole(norm)


def batch_loss(trainer: Trainer, images: Tensor, targets: Tensor) -> Tensor:
    """Loss of a micro-batch: of the labels, and of the teacher where there is one; scalar."""
    t = trainer
    if t.distiller is None:
        return t.loss(t.model(images).float(), targets)
    with t.distiller.watch():
        logits = t.model(images)
    return t.distiller(images, logits, targets, t.loss)


def finish_epoch(trainer: Trainer, loaders: Loaders, monitor: Monitor) -> dict[str, Any]:
    """Evaluate model and EMA at the end of an epoch, keep the best weights.

    Returns:
        The epoch's row of summary.csv; scores are None where it was not evaluated.
    """
    t, progress, epoch = trainer, trainer.progress, trainer.progress.epoch + 1
    monitor.begin_evaluation()
    row: dict[str, Any] = {"epoch": epoch, "train_loss": progress.loss_sum / progress.step}
    row |= dict.fromkeys(("eval_loss", "eval_top1", "eval_top5"))
    if epoch % t.config.eval_interval == 0 or epoch == t.config.epochs:
        first: list[tuple[Tensor, Tensor, Tensor]] = []
        scores = evaluate(t.bare, loaders, t.accelerator, t.peers, t.input_size, t.heed_signals, first)
        row |= {"eval_loss": scores.loss, "eval_top1": scores.top1, "eval_top5": scores.top5}
        if t.ema is not None:
            scores = evaluate(t.ema.module, loaders, t.accelerator, t.peers)
            row["eval_ema_top1"] = scores.top1
        t.share_faults()
        if progress.best is None or scores.top1 > progress.best["top1"]:
            progress.best = {"epoch": epoch, "top1": scores.top1, "top5": scores.top5, "loss": scores.loss}
            t.save_best()
        monitor.evaluated(row, t.inspect(t.bare) if t.inspect is not None else {}, progress, first)
    return {**row, "lr": learning_rate(t.optimizer)}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loaders: Loaders,
    accelerator: Accelerator,
    peers: Peers,
    input_size: tuple[int, int, int] | None = None,
    after_batch: Callable[[], None] | None = None,
    first: list[tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Scores:
    """Scores of a model over all processes' shares, each image counted once.

    The model is called without its DDP wrapper, and processes may have different numbers of batches; those that have none left
    keep step with the others where the model is spread over them (FSDP).

    Args:
        model: unwrapped.
        loaders: of this process.
        accelerator: sums over processes.
        peers: the other processes.
        input_size: channels, height, width; needed for a model that is spread over processes.
        after_batch: called equally often in all processes.
        first: gets images, labels and logits of this process's first batch.
    """
    was_training = model.training
    model.eval()
    sums, missing = torch.zeros(4, dtype=torch.float64, device=accelerator.device), 0
    for batch in in_step(loaders.eval, peers if loaders.num_eval is not None else None):
        missing += len(batch.faults) if batch is not None else 0
        if batch is not None and len(batch.labels):
            images, labels = (x.to(accelerator.device, non_blocking=True) for x in batch[:2])
            with accelerator.autocast():
                logits = model(images)
            sums += batch_sums(logits, labels)
            if first is not None and not first:
                first.append((images, labels, logits))
        elif is_sharded(model):
            assert input_size is not None
            model(torch.zeros(1, *input_size, device=accelerator.device))  # the others need this process's shards
        if after_batch is not None and loaders.num_eval is not None:
            after_batch()
    model.train(was_training)
    scores = scores_from_sums(accelerator.reduce(sums, reduction="sum"))
    found = scores.count + sum(peers.gather(missing))
    if loaders.num_eval is not None and found != loaders.num_eval:
        raise RuntimeError(f"evaluated {found} images of {loaders.num_eval}")
    return scores


def in_step(loader: EvalLoader, peers: Peers | None) -> Iterable[Batch | None]:
    """This process's batches, and None where another process has one more."""
    iterator = iter(loader)
    if peers is None:
        return iterator
    return (next(iterator, None) for _ in range(max(peers.gather(len(loader.loader)))))


def refuse_short_epoch(data: TrainLoader, step: int, epoch: int) -> None:
    """Raise DataError if the loader ended before the epoch did."""
    if step != data.steps_per_epoch:
        raise DataError(
            f"the training data ended after {step} of {data.steps_per_epoch} steps of epoch {epoch + 1}; "
            "a streamed set needs at least as many shards as processes x data.num_workers, and its true size"
        )
