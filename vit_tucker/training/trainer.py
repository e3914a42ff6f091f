"""All that the training loop works on, and how it is saved."""

import json
import math
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vit_tucker.config.schema import TrainConfig
from vit_tucker.data.faults import FaultLog
from vit_tucker.errors import DivergedError, FailedError, SaveError, StoppedError
from vit_tucker.storage.digests import save_model
from vit_tucker.storage.run_dir import LOGGER, RunDir
from vit_tucker.storage.weights import full_state, save_weights
from vit_tucker.training.coordination import Coordinator, Mirror, VoteResult
from vit_tucker.training.interrupt import Signals
from vit_tucker.training.objective import Objective
from vit_tucker.training.optim import Group, learning_rate
from vit_tucker.training.progress import Progress
from vit_tucker.training.state import flatten, save_checkpoint, write_state
from vit_tucker.training.step import OrdinaryStep, StepRule
from vit_tucker.training.step_log import StepLog, Steps
from vit_tucker.training.task import Task


@dataclass
class Trainer:
    """The model, optimizer and state that the training loop works on; built by vit_tucker.run.trainer.

    Attributes:
        accelerator: device, processes, precision.
        coordinator: the other processes.
        model: prepared model; ``bare`` is the same without wrappers.
        optimizer: prepared optimizer.
        scheduler: timm's, over global steps.
        objective: what is minimised.
        mixup: timm's, or None.
        ema: timm's, or None.
        config: the recipe.
        seed: of the run.
        run_dir: where results go.
        metadata: strings for the header of saved weights.
        description: config.json beside saved weights, see ``vit_tucker.storage.digests``; None for none.
        describe: what makes metadata and description of the bare model, after a change of shapes; None to keep them.
        rule: how a step is made.
        progress: where the run stands.
        task: what is learned.
        groups: the optimizer's groups, by name.
        faults: images that can't be read.
        inspect: scalars of the bare model for TensorBoard, written at each evaluation; None for none.
        signals: what this process was asked from outside.
        losses: this process's losses, one step late where there is a GPU.
        log: the steps that are not yet averaged over processes.
        log_due: whether the norm of the step's gradient is to be logged.
    """

    accelerator: Accelerator
    coordinator: Coordinator
    model: nn.Module
    bare: nn.Module
    optimizer: Any
    scheduler: Scheduler
    objective: Objective
    mixup: Mixup | None
    ema: ModelEmaV3 | None
    config: TrainConfig
    seed: int
    run_dir: RunDir
    metadata: dict[str, str]
    progress: Progress
    task: Task
    groups: list[Group]
    faults: FaultLog
    description: dict[str, Any] | None = None
    describe: Callable[[nn.Module], tuple[dict[str, str], dict[str, Any] | None]] | None = None
    rule: StepRule = field(default_factory=OrdinaryStep)
    inspect: Callable[[nn.Module], dict[str, float]] | None = None
    signals: Signals = field(default_factory=Signals)
    losses: Mirror = field(default_factory=Mirror)
    log: StepLog = field(default_factory=StepLog)
    log_due: bool = False

    def is_finite(self, loss: Tensor, norm: Tensor | None) -> bool:
        """Returns whether ``loss`` and ``norm`` (scalars; None or unused if a scaler checks it) are finite, late on a GPU."""
        watched = [loss] if norm is None or self.accelerator.scaler is not None else [loss, norm]
        value = self.losses.swap(torch.stack([x.float() for x in watched]).sum())
        return value is None or bool(torch.isfinite(value))

    def average_steps(self, diverged: bool) -> Steps:
        """Averages the steps that are pending over processes, into the progress; every process must call this alike.

        Args:
            diverged: a process has seen a loss that is not finite.

        Raises:
            DivergedError: it has, or an average is not finite (a gradient's, where no scaler checks it).
        """
        steps = self.log.average(self.progress, self.accelerator)
        norms = [] if self.accelerator.scaler is not None else steps.norms.values()
        if diverged or not all(map(math.isfinite, [*steps.losses, *norms])):
            self.fail_diverged(steps.losses)
        return steps

    def has_new_faults(self) -> bool:
        """Returns whether this process met bad images that the others don't know yet."""
        return len(self.faults) > len(self.progress.faults)

    def share_faults(self) -> None:
        """Shares the bad images of each process with all, and logs the new ones.

        Raises:
            DataError: more in all than allowed; in all processes.
        """
        lines = self.coordinator.union(self.faults.lines)
        new = [line for line in lines if line not in self.progress.faults]
        self.progress.faults += new
        for line in new:
            LOGGER.warning(f"bad image {self.progress.faults.index(line) + 1} of at most {self.faults.limit}: {line}")
        self.coordinator.agreed = len(self.progress.faults) > self.faults.limit
        self.faults.add(lines)

    def save(self) -> None:
        """Writes a checkpoint that the run can be resumed from.

        Raises:
            SaveError: it can't be written; those before it are intact.
        """
        weights = {"model": full_state(self.bare)}
        if self.ema is not None:
            weights["ema"] = full_state(self.ema.module)
        optimizer, rule = self._optimizer_state(), None
        if (given := self.config.step_rule) is not None:
            state = {"name": given["name"], "state": self.rule.state_dict()}
            rule = flatten(state, "step_rule", optimizer[1])
        progress = {**asdict(self.progress), "scaler": self._scaler_state()}
        folder, keep = self.run_dir.checkpoints, self.config.checkpoint_hist
        header, config = self.metadata, self.description
        self._write(
            lambda: save_checkpoint(folder, weights, optimizer, progress, header, keep, config, rule), "a checkpoint"
        )

    def save_best(self) -> None:
        """Writes the current weights (the EMA's where there is one) as the best; their header has ``progress.best``.

        Raises:
            SaveError: they can't be written; the best before them are intact.
        """
        best = self.progress.best
        assert best is not None
        state = full_state(self.ema.module if self.ema is not None else self.bare)
        name = self.task.measures[0].name
        header = {**self.metadata, "epoch": str(best["epoch"]), name: f"{best[name]:.4f}", "best": json.dumps(best)}
        file, config = self.run_dir.best, self.description

        def write() -> None:
            if config is None:
                save_weights(file, state, header)
            else:
                save_model(file.parent, file.name, state, header, config)

        self._write(write, "the best weights")

    def _write(self, write: Callable[[], Any], what: str) -> None:
        """Writes on the main process; all of them fail together."""

        def guarded() -> None:
            try:
                write()
            except OSError as error:
                reason = error.strerror or str(error)
                step = self.progress.global_step
                raise SaveError(
                    f"{what} at step {step} can't be written: {reason}; the ones before it are intact: free some space in "
                    f"{self.run_dir.path}, then the same command continues"
                ) from error

        self.coordinator.on_main(guarded)

    def handle(self, outcome: VoteResult) -> None:
        """Saves the state and stops if a signal asked for it, in all processes after the same step.

        Raises:
            StoppedError: it did.
        """
        if not outcome.signal:
            return
        self.save()
        name, progress = signal.Signals(outcome.signal).name, self.progress
        raise StoppedError(
            f"stopped by {name} after step {progress.global_step} (epoch {progress.epoch + 1}), state saved"
        )

    def handle_signals(self) -> None:
        """Handles the signals that any process has caught; every process must call this equally often."""
        self.handle(self.coordinator.vote(self.signals.number))

    def fail_diverged(self, losses: list[float]) -> NoReturn:
        """Saves the state for inspection, beside the checkpoints and not among them.

        Args:
            losses: of the last steps, all processes' means, the newest last.

        Raises:
            DivergedError: always.
        """
        t, step = self, self.progress.global_step
        bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
        first = bad[0] if bad else len(losses) - 1
        what = f"the loss is {losses[first]}" if bad else "the gradient is not finite"
        bad_step, scaler = step - len(losses) + first + 1, t._scaler_state()
        t.scheduler.step_update(bad_step - 1)  # the rates that this step had
        rates = [group["lr"] for group in t.optimizer.param_groups]
        folder = t.run_dir.path / f"diverged-{bad_step:08d}"
        facts = {
            "step": bad_step,
            "saved_after_step": step,
            "epoch": t.progress.epoch + 1,
            "losses": [str(loss) for loss in losses],
            "lr": rates,
            "loss_scale": scaler and scaler.get("scale"),
        }
        weights, optimizer = {"model": full_state(t.bare)}, t._optimizer_state()
        kept = f"the state after step {step} is in {folder}"
        try:
            t._write(lambda: write_state(folder, weights, optimizer, facts, t.metadata), "the diverged state")
        except FailedError as error:  # is for looking at, and must not hide why the run ends
            kept = str(error).partition(";")[0]
        t.coordinator.agreed = True
        scale = "" if scaler is None else f", loss scale {scaler.get('scale'):g}"
        raise DivergedError(
            f"{what} at step {bad_step} (epoch {t.progress.epoch + 1}, lr {learning_rate(t.optimizer):.3g}{scale}); {kept}; "
            "lower train.lr, or set train.clip_grad or train.mixed_precision"
        )

    def _optimizer_state(self) -> tuple[Any, dict[str, Any]]:
        """Returns the optimizer's state as ``flatten`` gives it, in whole tensors; if sharded, all processes must call this."""
        tensors: dict[str, Any] = {}
        bare = getattr(self.optimizer, "optimizer", self.optimizer)
        return flatten(bare.state_dict(), "optimizer", tensors), tensors

    def _scaler_state(self) -> dict[str, Any] | None:
        return self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
