"""Finds the checkpoint that a run continues from: the newest that is whole, the same one in all processes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.utils import ModelEmaV3
from torch import nn

from vit_tucker.errors import CheckpointError
from vit_tucker.storage.checkpoints import newest_intact
from vit_tucker.storage.digests import verify_beside
from vit_tucker.storage.json_files import parse_object
from vit_tucker.storage.run_dir import LOGGER, RunDir
from vit_tucker.storage.weights import weights_metadata
from vit_tucker.training.coordination import Coordinator
from vit_tucker.training.progress import Progress
from vit_tucker.training.saved_state import check_best, read_progress
from vit_tucker.training.state import load_checkpoint


@dataclass
class Saved:
    """The state that a run goes on from; the defaults are a fresh start.

    Attributes:
        progress: where it stood.
        optimizer: state dict.
        scaler: GradScaler's state dict.
        step_rule: name and state.
    """

    progress: Progress = field(default_factory=Progress)
    optimizer: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    step_rule: dict[str, Any] | None = None


def resume(run_dir: RunDir, coordinator: Coordinator, model: nn.Module, ema: ModelEmaV3 | None) -> Saved:
    """Returns the state of the newest intact checkpoint, its weights loaded into model and EMA; a fresh start without one.

    Damaged checkpoints that are newer are named and skipped; the run replaces them when it reaches their steps again.

    Args:
        run_dir: of the run.
        coordinator: of the processes.
        model, ema: given the checkpoint's weights, in place.

    Raises:
        CheckpointError: none is intact, or it is of another model.
    """
    name = coordinator.on_main(lambda: choose_checkpoint(run_dir))
    if name is None:
        return Saved()
    checkpoint = run_dir.checkpoints / name
    state = coordinator.together(lambda: load_checkpoint(checkpoint, model, ema.module if ema else None))
    progress, scaler = coordinator.together(lambda: read_progress(state.progress, checkpoint))
    progress.best = coordinator.on_main(lambda: best_on_disk(run_dir.best, progress.best))
    LOGGER.info(f"continuing {run_dir.path} from step {progress.global_step} (epoch {progress.epoch + 1})")
    if progress.processes != coordinator.num_processes:
        LOGGER.info(
            f"on {coordinator.num_processes} process(es), before on {progress.processes}: the same images and batches, sums "
            "rounded in another order; dropout and drop path draw anew"
        )
    return Saved(progress, state.optimizer, scaler, state.step_rule)


def choose_checkpoint(run_dir: RunDir) -> str | None:
    """Returns the name of the newest intact checkpoint; damaged ones are named in the log."""
    checkpoint, damaged = newest_intact(run_dir.checkpoints)
    if checkpoint is None:
        return None
    for line in damaged:
        LOGGER.warning(f"{line}; going back to {checkpoint.name}")
    return checkpoint.name


def best_on_disk(file: Path, best: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns the scores of the best weights on disk: they are written before the checkpoint of their epoch."""
    if not file.is_file():
        return None
    try:
        verify_beside(file)
        found = parse_object(weights_metadata(file)["best"], str(file), all_finite=False)
        check_best(found, str(file))
        return found
    except (CheckpointError, KeyError):
        LOGGER.warning(f"{file}: damaged; the best weights are looked for anew from here on")
        return None
