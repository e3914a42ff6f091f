"""Trackers by name: refused names, what a tracker gets, failures that don't end the run."""

import logging
from typing import ClassVar

import pytest
from accelerate import Accelerator
from accelerate import tracking as registry

from vit_tucker.errors import ConfigError
from vit_tucker.training.trackers import RUN_NAME, Trackers, check_trackers, flat_config


class Recorder(registry.GeneralTracker):
    """Records its calls, in the place of a real tracker."""

    name = "mlflow"
    requires_logging_directory = False
    calls: ClassVar[list] = []
    broken: ClassVar[tuple] = ()

    def __init__(self, project, **options):
        super().__init__()
        self._tell("init", project, options)

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self._tell("config", values)

    def log(self, values, step=None, **options):
        self._tell("log", values, step)

    def finish(self):
        self._tell("finish")

    def _tell(self, what, *values):
        self.calls.append((what, *values))
        if what in self.broken:
            raise OSError(f"no space for {what}")


@pytest.fixture
def recorder(monkeypatch):
    """Accelerate's registry with Recorder under the name mlflow, installed, and wandb not."""
    monkeypatch.setitem(registry.LOGGER_TYPE_TO_CLASS, "mlflow", Recorder)
    installed = [registry.LoggerType.TENSORBOARD, registry.LoggerType.MLFLOW]
    monkeypatch.setattr(registry, "_available_trackers", installed)
    monkeypatch.setattr(Recorder, "calls", [])
    return Recorder


def started(names=("mlflow",)):
    trackers = Trackers(Accelerator(cpu=True, log_with=check_trackers(names) or None))
    trackers.start({"seed": 3, "train": {"lr": 0.1, "opt_betas": None, "distill": {}}}, "digits-3")
    return trackers


def test_names_are_checked(recorder):
    assert check_trackers([]) == check_trackers(["tensorboard"]) == []
    assert check_trackers(["mlflow", "tensorboard", "mlflow"]) == ["mlflow"]
    with pytest.raises(ConfigError, match="train.trackers: 'wandbb' is none of .*mlflow.*did you mean 'wandb'"):
        check_trackers(["mlflow", "wandbb"])
    with pytest.raises(ConfigError, match="'wandb' is not installed; pip install wandb$"):
        check_trackers(["wandb"])


def test_trackers_of_plugins_are_known(recorder, monkeypatch):
    """A class that a plugin registers with Accelerate counts as installed."""
    monkeypatch.setitem(registry.LOGGER_TYPE_TO_CLASS, "lab_book", Recorder)
    assert check_trackers(["lab_book"]) == ["lab_book"]
    with pytest.raises(ConfigError, match="did you mean 'lab_book'"):
        check_trackers(["labbook"])


def test_a_tracker_gets_config_scalars_and_the_end(recorder):
    trackers = started()
    trackers.log({"train/loss": 1, "eval/top1": None, "train/lr": 1e-3}, step=50)
    trackers.finish()
    trackers.log({"train/loss": 2.0}, step=51)  # after the end: to nobody
    assert recorder.calls == [
        ("init", "vit_tucker", {"run_name": "digits-3"}),
        ("config", {"seed": 3, "train.lr": 0.1, "train.opt_betas": "None", "train.distill": "{}"}),
        ("log", {"train/loss": 1.0, "train/lr": 1e-3}, 50),
        ("finish",),
    ]


def test_without_names_nothing_is_started(recorder):
    trackers = started([])
    trackers.log({"train/loss": 1.0}, step=1)
    trackers.finish()
    assert recorder.calls == []
    assert started(["tensorboard"]).accelerator.trackers == []


def test_a_tracker_that_does_not_start_is_an_error_before_training(recorder, monkeypatch):
    monkeypatch.setattr(Recorder, "broken", ("config",))
    with pytest.raises(ConfigError, match="train.trackers: mlflow can't start: OSError: no space for config"):
        started()


def test_a_failing_tracker_does_not_end_the_run(recorder, monkeypatch):
    trackers, said = started(), []
    monkeypatch.setattr(Recorder, "broken", ("log", "finish"))
    monkeypatch.setattr(logging.getLogger("vit_tucker"), "warning", said.append)
    for step in range(3):
        trackers.log({"train/loss": 1.0}, step)
    trackers.finish()
    assert len(recorder.calls) == 6  # it was asked each time
    assert said == ["tracker mlflow failed, the run goes on: OSError: no space for log"]


def test_run_names_are_for_trackers_that_exist():
    assert RUN_NAME.keys() - {"trackio", "swanlab"} <= {str(n) for n in registry.LOGGER_TYPE_TO_CLASS}  # two are new


def test_flat_config():
    assert flat_config({"a": {"b": {"c": [1, 2]}, "d": True}, "e": 1.5}) == {"a.b.c": "[1, 2]", "a.d": True, "e": 1.5}
