"""Experiment trackers beside TensorBoard, by Accelerate's names.

TensorBoard itself is always written, by our own writer (it can purge what a killed run wrote beyond its checkpoint), so that the
name 'tensorboard' is accepted and adds nothing. A resumed run is a new run to these trackers. A tracker that fails while the run
is going on costs a warning, not the run.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate import tracking as registry

from vit_tucker.errors import ConfigError, nearest, one_line
from vit_tucker.storage.run_dir import LOGGER

PROJECT = "vit_tucker"
RUN_NAME = {
    "wandb": "name",
    "mlflow": "run_name",
    "trackio": "name",
    "swanlab": "experiment_name",
    "clearml": "task_name",
}
"""Which option of a tracker takes the name of a run; the others name runs themselves."""


def check_trackers(names: Sequence[str]) -> list[str]:
    """Returns the trackers to start: each once, without 'tensorboard'.

    Raises:
        ConfigError: a name that Accelerate doesn't know, or whose package is missing.
    """
    known = sorted({str(name) for name in registry.LOGGER_TYPE_TO_CLASS})
    installed = {str(name) for name in registry.get_available_trackers()}
    built_in = {str(name) for name in registry.LoggerType}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"train.trackers: '{name}' is none of {', '.join(known)}{nearest(name, known)} (Accelerate's names)"
            )
        if name in built_in - installed - {"tensorboard"}:
            raise ConfigError(f"train.trackers: '{name}' is not installed; pip install {name}")
    return [name for name in dict.fromkeys(names) if name != "tensorboard"]


class Trackers:
    """Manages the trackers of a run; does nothing where there are none.

    Args:
        accelerator: made with ``log_with=check_trackers(...) or None``, and with ``project_dir=`` the run folder, where some
            trackers write files.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._failed: set[str] = set()

    def start(self, config: Mapping[str, Any], run_name: str) -> None:
        """Starts all with the resolved config, nested plain values, as hyperparameters.

        Raises:
            ConfigError: a tracker does not start (no login, no network); so that this is known before any training.
        """
        names = [str(name) for name in self.accelerator.log_with]
        if not names:
            return
        options = {name: {RUN_NAME[name]: run_name} for name in names if name in RUN_NAME}
        try:
            self.accelerator.init_trackers(PROJECT, config=flat_config(config), init_kwargs=options)
        except Exception as error:  # each tracker has exceptions of its own
            reason = one_line(error, 300)
            raise ConfigError(
                f"train.trackers: {', '.join(names)} can't start: {type(error).__name__}: {reason}"
            ) from None

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        """Passes scalars to all trackers, which write on the main process only.

        Args:
            values: by TensorBoard's names, e.g. 'train/loss'; None is left out.
            step: finished optimizer steps.
        """
        scalars = {name: float(value) for name, value in values.items() if value is not None}
        for tracker in self.accelerator.trackers:
            self._guarded(tracker, "log", scalars, step=step)

    def finish(self) -> None:
        """Closes all. Accelerate's ``end_training`` would also end the process group."""
        for tracker in self.accelerator.trackers:
            self._guarded(tracker, "finish")
        self.accelerator.trackers.clear()

    def _guarded(self, tracker: Any, method: str, *args: Any, **options: Any) -> None:
        """Calls a tracker; its first failure is a warning, the next ones are ignored."""
        try:
            getattr(tracker, method)(*args, **options)
        except Exception as error:  # each tracker has exceptions of its own
            if tracker.name not in self._failed:
                self._failed.add(tracker.name)
                LOGGER.warning(f"tracker {tracker.name} failed, the run goes on: {type(error).__name__}: {error}")


def flat_config(values: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Flattens a nested config to dotted keys; lists and null become text, which all trackers accept."""
    flat: dict[str, int | float | str | bool] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flat_config(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
