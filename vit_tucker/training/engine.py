"""The training loop: one optimizer step, one evaluation, and the loop around them."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vit_tucker.data.batches import Batch, Batches, StepBatches
from vit_tucker.data.loaders import Loaders
from vit_tucker.data.seeding import derive_seed, seed_everything
from vit_tucker.errors import DataError
from vit_tucker.storage.weights import is_sharded
from vit_tucker.training.coordination import Coordinator
from vit_tucker.training.interrupt import catch_signals
from vit_tucker.training.monitor import NullMonitor
from vit_tucker.training.objective import Loss
from vit_tucker.training.optim import learning_rate
from vit_tucker.training.reshape import replace_parameters
from vit_tucker.training.step import StepResult
from vit_tucker.training.task import Task
from vit_tucker.training.trainer import Trainer


def fit(trainer: Trainer, loaders: Loaders, monitor: NullMonitor) -> None:
    """Trains from ``trainer.progress`` to the last epoch: train, evaluate, save; epoch by epoch.

    Args:
        trainer: model, optimizer and state of the run.
        loaders: with training data.
        monitor: is called back at each step and epoch.

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
            t.log.begin_epoch(progress)
            monitor.begin_epoch(progress)
            for micro_batches in monitor.timed(data.steps(progress.epoch, progress.step)):
                last = progress.step + 1 == data.steps_per_epoch
                save_due = config.saves_after(progress.global_step + 1) and not last
                t.log_due = save_due or last or config.logs_after(progress.global_step + 1)
                result = train_step(t, micro_batches)
                progress.finish_step()
                t.log.add(result)
                monitor.stepped()
                outcome = t.coordinator.vote(
                    t.signals.number, not t.is_finite(result.loss.total, result.norm), t.has_new_faults()
                )
                if t.log_due or outcome.signal or outcome.diverged:
                    monitor.show_steps(t.average_steps(outcome.diverged), progress, t.optimizer)
                if outcome.faults:
                    t.share_faults()
                if save_due:
                    t.save()
                t.handle(outcome)
            refuse_short_epoch(data, progress.step, progress.epoch)
            row = finish_epoch(t, loaders, monitor)
            progress.finish_epoch(row)
            if t.accelerator.is_main_process:
                t.run_dir.write_summary(progress.rows)
            monitor.end_epoch(progress)
            if progress.epoch % config.checkpoint_epochs == 0 or progress.epoch == config.epochs:
                t.save()


def train_step(trainer: Trainer, micro_batches: list[Batch]) -> StepResult:
    """Makes one optimizer step over this process's micro-batches by the run's step rule.

    Args:
        trainer: of the run.
        micro_batches: images (B, channels, height, width) and labels (B,), or tokens (B, N) and those that follow.

    Returns:
        This process's mean loss, and the norm of all processes' gradient (None if not measured); detached scalars.
    """
    t, step = trainer, trainer.progress.global_step
    result = t.rule.step(partial(batch_gradient, t, micro_batches), t)
    if result.reshaped:
        replace_parameters(t, result)
    t.scheduler.step_update(step + 1)
    if t.ema is not None:
        t.ema.update(t.bare, step=step)
    return result


def batch_gradient(trainer: Trainer, micro_batches: list[Batch]) -> Loss:
    """Adds the gradient of a step's whole batch, averaged over processes, and of the penalties of the model.

    All randomness of the step follows from (seed, step, process); mixup draws from (seed, step), so that all processes and
    micro-batches mix their mirrored shards alike. Penalties go into the last backward pass: that is the one in which DDP averages
    over processes, which have all computed the same ones.

    Returns:
        This process's mean loss and its terms, detached.
    """
    t, device, share = trainer, trainer.accelerator.device, 1 / len(micro_batches)
    step, rank = t.progress.global_step, t.accelerator.process_index
    seed_everything(derive_seed(t.seed, step, 2, rank))
    total, terms = torch.zeros((), device=device), defaultdict[str, Tensor](lambda: torch.zeros((), device=device))
    for number, (batch, labels, _) in enumerate(micro_batches):
        # mixup writes into its images, which a rule may need again
        images = batch.to(device, non_blocking=True, copy=t.mixup is not None)
        targets = labels.to(device, non_blocking=True)
        if t.mixup is not None:
            np.random.seed(derive_seed(t.seed, step, 3))  # noqa: NPY002  # timm's mixup draws from the global state
            images, targets = t.mixup(images, targets)
        last = number == len(micro_batches) - 1
        with contextlib.nullcontext() if last else t.accelerator.no_sync(t.model):
            loss, parts = t.objective.of_batch(t.model, images, targets)
            loss = loss / len(micro_batches)
            penalties: dict[str, Tensor] = {}
            if last:
                loss, penalties = t.objective.with_penalties(loss, t.bare)
            t.accelerator.backward(loss)
        total += loss.detach()
        for name, value in [*((n, v * share) for n, v in parts.items()), *penalties.items()]:
            terms[name] += value
    return Loss(total, dict(terms))


def finish_epoch(trainer: Trainer, loaders: Loaders, monitor: NullMonitor) -> dict[str, Any]:
    """Evaluates model and EMA at the end of an epoch, and saves the best weights; arguments as of ``fit``.

    Returns:
        The epoch's row of summary.csv; scores are None where it was not evaluated.
    """
    t, progress, epoch = trainer, trainer.progress, trainer.progress.epoch + 1
    monitor.begin_evaluation()
    row: dict[str, Any] = {"epoch": epoch, "train_loss": progress.loss_sum / progress.step}
    if t.objective.penalties:
        row |= {f"train_loss_{name}": mean for name, mean in progress.term_means().items()}
    measures, decides = t.task.measures, t.task.measures[0]
    row |= dict.fromkeys(("eval_loss", *(measure.column for measure in measures)))
    if epoch % t.config.eval_interval == 0 or epoch == t.config.epochs:
        first: list[tuple[Tensor, Tensor, Tensor]] = []
        place = t.task, loaders, t.accelerator, t.coordinator
        scores = evaluate(t.bare, *place, t.handle_signals, first if t.task.draws else None)
        row |= {"eval_loss": scores.loss, **{measure.column: getattr(scores, measure.name) for measure in measures}}
        if t.ema is not None:
            scores = evaluate(t.ema.module, *place)
            row[f"eval_ema_{decides.name}"] = getattr(scores, decides.name)
        t.share_faults()
        found = {measure.name: getattr(scores, measure.name) for measure in measures}
        if progress.best is None or decides.better(found[decides.name], progress.best[decides.name]):
            progress.best = {"epoch": epoch, **found, "loss": scores.loss}
            t.save_best()
        monitor.evaluated(row, t.inspect(t.bare) if t.inspect is not None else {}, progress, first)
    return {**row, "lr": learning_rate(t.optimizer)}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    loaders: Loaders,
    accelerator: Accelerator,
    coordinator: Coordinator,
    after_batch: Callable[[], None] | None = None,
    first: list[tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Any:
    """Computes the scores of a model over all processes' shares, each image or token counted once.

    The model is called without its DDP wrapper, and processes may have different numbers of batches; those that have none left
    keep step with the others where the model is spread over them (FSDP).

    Args:
        model: unwrapped.
        task: of the model.
        loaders: of this process.
        accelerator: sums over processes.
        coordinator: the other processes.
        after_batch: called equally often in all processes.
        first: filled with images (B, channels, height, width), labels (B,) and logits (B, classes) of this process's first batch.

    Returns:
        The task's scores.

    Raises:
        RuntimeError: some images or tokens were not evaluated.
    """
    was_training = model.training
    model.eval()
    sums, missing = torch.zeros(task.num_sums, dtype=torch.float64, device=accelerator.device), 0
    for batch in in_step(loaders.eval, coordinator if loaders.num_eval is not None else None):
        missing += len(batch.faults) if batch is not None else 0
        if batch is not None and len(batch.labels):
            images, labels = (x.to(accelerator.device, non_blocking=True) for x in batch[:2])
            with accelerator.autocast():
                logits = task.logits(model, images)
            sums += task.sums(logits, labels)
            if first is not None and not first:
                first.append((images, labels, logits))
        elif is_sharded(model):
            task.logits(model, task.example(1)[0].to(accelerator.device))  # the others need this process's shards
        if after_batch is not None and loaders.num_eval is not None:
            after_batch()
    model.train(was_training)
    scores = task.scores(accelerator.reduce(sums, reduction="sum"))
    found = scores.count + sum(coordinator.gather(missing))
    if loaders.num_eval is not None and found != loaders.num_eval:
        raise RuntimeError(f"evaluated {found} {task.unit} of {loaders.num_eval}")
    return scores


def in_step(loader: Batches, coordinator: Coordinator | None) -> Iterable[Batch | None]:
    """Yields this process's batches, and None where another process has one more."""
    iterator = iter(loader)
    if coordinator is None:
        return iterator
    return (next(iterator, None) for _ in range(max(coordinator.gather(len(loader)))))


def refuse_short_epoch(data: StepBatches, step: int, epoch: int) -> None:
    """Raises DataError if the loader ended before the epoch did.

    Args:
        data: the training loader.
        step: steps done in the epoch.
        epoch: its number, from 0.
    """
    if step != data.steps_per_epoch:
        raise DataError(
            f"the training data ended after {step} of {data.steps_per_epoch} steps of epoch {epoch + 1}; "
            "a streamed set needs at least as many shards as processes x data.num_workers, and its true size"
        )
