"""A run's folder around its training: who may write, which config it goes on with, the first files, and failures."""

import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from vit_tucker.config.load import dump_config, plain_config, validate
from vit_tucker.config.places import STARTED_FILE, as_stored
from vit_tucker.config.schema import RunConfig
from vit_tucker.config.source import Source, read_yaml
from vit_tucker.data.loaders import Loaders
from vit_tucker.errors import CheckpointError, ConfigError, FailedError, SaveError, VitTuckerError
from vit_tucker.run.built import BuiltModel
from vit_tucker.run.weights import save_teacher
from vit_tucker.storage.checkpoints import intact_checkpoint
from vit_tucker.storage.run_dir import LOGGER, RunDir
from vit_tucker.storage.weights import replace_text
from vit_tucker.training.coordination import Coordinator, error_line
from vit_tucker.training.lock import RunLock


@dataclass
class Claim:
    """Tracks what the processes of one run may do with its folder; only the first one has the lock.

    Attributes:
        run_dir: the folder.
        lock: of it.
        taken: the folder was there, and is this run's now.
        begun: this run has written into it.
    """

    run_dir: RunDir
    lock: RunLock = field(init=False)
    taken: bool = False
    begun: bool = False

    def __post_init__(self) -> None:
        self.lock = RunLock(self.run_dir.path)

    def take(self, coordinator: Coordinator, dry_run: bool) -> None:
        """Locks a folder that is there for this run, on the first process for all; a dry run only checks.

        Raises:
            ConfigError: another run is being trained there; nothing has changed.
        """

        def ask() -> bool:
            if not self.run_dir.path.is_dir():
                return False
            if dry_run:
                self.lock.refuse_held()
            else:
                self.lock.take()
            return not dry_run

        self.taken = coordinator.on_main(ask)

    def kept_config(self, config: RunConfig) -> tuple[RunConfig, str]:
        """Returns the config for config.yaml and results.json, and the text of started.json, see ``as_stored``."""
        run_dir = self.run_dir
        stored = read_yaml(run_dir.config).values if run_dir.begun and run_dir.config.is_file() else {}
        values, started = as_stored(plain_config(config), stored, run_dir.path)
        return validate(Source(values)), started

    def begin(self, config: RunConfig, started: str, built: BuiltModel, loaders: Loaders) -> None:
        """Writes what a run starts with; on the first process.

        Args:
            config: of the run, as it is stored.
            started: text of started.json.
            built: the model.
            loaders: of the run.

        Raises:
            ConfigError: another run has begun in the folder since this one looked. SaveError: it can't be written to.
        """
        run_dir = self.run_dir
        if not self.lock.held:
            self.lock.take()
            if run_dir.config.is_file():
                raise ConfigError(
                    f"output_dir: a run has begun in {run_dir.path} while this one was set up: start it again to go on with "
                    "that one, or choose another output_dir="
                )
        if self.lock.note is not None:
            LOGGER.info(self.lock.note)
        keep_teacher = run_dir.begun and run_dir.teacher.is_file()
        try:
            run_dir.start(dump_config(config), built.patch, built.data, loaders.label_names)
            replace_text(run_dir.path / STARTED_FILE, started)
            if built.teacher is not None and not keep_teacher:
                save_teacher(run_dir, built.teacher, config.model.name)
        except OSError as error:
            raise unwritable(run_dir.path, error) from error


def unwritable(path: Path, error: OSError) -> SaveError:
    """Returns the error of a run that can't write a file that it needs."""
    reason = error.strerror or str(error)
    return SaveError(f"{path} can't be written to: {reason}; free some space there, then the same command goes on")


def record_failure(claim: Claim, coordinator: Coordinator, error: Exception) -> None:
    """Writes a failure to train.log: the traceback of what is no user's mistake; of several processes, whose it was.

    Where the first process does not report it, a line goes to standard error too.

    Args:
        claim: on the run's folder.
        coordinator: of the processes.
        error: that ended the run.
    """
    expected = isinstance(error, VitTuckerError | FailedError)
    alone = coordinator.num_processes > 1 and not coordinator.agreed
    line = f"process {coordinator.rank} failed: {error_line(error)}" if alone else f"error: {error_line(error)}"
    if claim.begun or (claim.taken and not expected):
        if not expected:
            claim.run_dir.log_failure("".join(traceback.format_exception(error)).rstrip())
        if alone or (coordinator.rank == 0 and expected):
            claim.run_dir.log_failure(line)
    if alone and coordinator.rank != 0:
        print(f"error: {line}", file=sys.stderr, flush=True)


def weights_to_evaluate(run_dir: RunDir) -> Path | None:
    """Returns the best weights of a run, else, with a warning, those of its last intact checkpoint (the EMA's if there is one).

    Returns:
        None for a run that has not got so far: it is at its start.

    Raises:
        CheckpointError: the run was trained, and its weights are gone or damaged.
    """
    if run_dir.best.is_file():
        return run_dir.best
    checkpoint, damaged = intact_checkpoint(run_dir.checkpoints)
    if checkpoint is None:
        if run_dir.results.is_file():
            raise CheckpointError(
                f"{run_dir.path}: the run is finished, but it has neither {run_dir.best.parent.relative_to(run_dir.path)} nor "
                "another checkpoint any more: there is nothing to evaluate; remove the folder to train anew"
            )
        return None
    for line in [*damaged, f"{run_dir.path}: no best weights, so those of {checkpoint.name} are evaluated"]:
        LOGGER.warning(line)
    averaged = checkpoint / "ema.safetensors"
    return averaged if averaged.is_file() else checkpoint / "model.safetensors"
