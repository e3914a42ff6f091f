"""Defines the YAML schema of a sweep."""

import shlex
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vit_tucker.config.data_section import PathText
from vit_tucker.validation.checked import MAX_INTEGER, Checked

Seed = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
START = "start"
"""Name of the dense runs that the cells start from."""


class CellConfig(Checked):
    """One or many settings: an attention section, and what varies."""

    name: str = Field(
        description="Name of its run folders; '{attention.ranks}' stands for the value that a key of vary has, "
        "'{init}' for the label."
    )
    attention: dict[str, Any] | None = Field(description="As in a run's config; null: the dense host.")
    set: dict[str, Any] = Field(default={}, description="Other config keys of these cells, on top of finetune.")
    vary: dict[str, list[Any] | dict[str, dict[str, Any]]] = Field(
        default={},
        description="All combinations are run: a config key and its values, or any word and a config section per label.",
    )

    @field_validator("vary")
    @classmethod
    def _not_empty(cls, vary: dict[str, Any]) -> dict[str, Any]:
        if empty := [key for key, values in vary.items() if not values]:
            raise ValueError(f"{empty[0]} has no values")
        return vary


SBATCH_OPTIONS = {
    **{key: key for key in ("time", "partition", "account", "gpus")},
    "gpus-per-node": "gpus",
    "cpus-per-task": "cpus",
    "mem": "memory",
    "signal": "signal_seconds",
    "array": "jobs",
}
"""The key of ExecutorConfig that sets an option of sbatch."""


class ExecutorConfig(Checked):
    """The place where the runs are trained; command-line values override the file: executor.time=600."""

    kind: Literal["local", "slurm"] = Field(
        default="local", description="local: processes of this machine; slurm: job arrays of a cluster (--executor)."
    )
    jobs: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="Runs at a time (--jobs): null is 1 on this machine, and what Slurm allows on a cluster, else its jobs of "
        "one array.",
    )
    launch: str | None = Field(
        default=None, description="Arguments of accelerate launch, which then starts each run (--launch)."
    )
    time: int = Field(
        default=1440,
        ge=1,
        le=1_000_000,
        description="Slurm: minutes of a job; a run that needs more is queued again (--time).",
    )
    partition: str | None = Field(default=None, description="Slurm: partition (--partition).")
    account: str | None = Field(default=None, description="Slurm: account.")
    gpus: int | None = Field(
        default=None,
        ge=0,
        le=4096,
        description="Slurm: GPUs of a run; several are used by DDP, unless launch has its own way (--gpus).",
    )
    cpus: int | None = Field(default=None, ge=1, le=4096, description="Slurm: CPU cores of a run.")
    memory: float | None = Field(default=None, gt=0, le=1e6, description="Slurm: memory of a run in GB.")
    signal_seconds: int = Field(
        default=300,
        ge=1,
        le=86_400,
        description="Slurm: seconds before the time limit at which a run saves its state and leaves.",
    )
    setup: tuple[str, ...] = Field(default=(), description="Slurm: shell lines before a run, as 'module load cuda'.")
    slurm: dict[str, str | int | bool] = Field(
        default={}, description="Other options of sbatch by their long names: {qos: high, gres: 'gpu:a100:4'}."
    )

    @field_validator("time", mode="before")
    @classmethod
    def _minutes(cls, time: Any) -> Any:
        if isinstance(time, str):
            raise ValueError(f"a whole number of minutes, as 90, or 1440 for a day, not '{time}'")
        return time

    @field_validator("launch")
    @classmethod
    def _quoted(cls, launch: str | None) -> str | None:
        shlex.split(launch or "")  # "No closing quotation"
        return launch

    @field_validator("slurm")
    @classmethod
    def _others(cls, slurm: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        for option in slurm:
            if (key := SBATCH_OPTIONS.get(option.replace("_", "-"))) is not None:
                raise ValueError(f"{option} is set by executor.{key}")
        return slurm

    @model_validator(mode="after")
    def _time_to_train(self) -> "ExecutorConfig":
        if self.signal_seconds >= 60 * self.time:
            raise ValueError(f"signal_seconds {self.signal_seconds} leaves nothing of time {self.time} (minutes)")
        return self


class SweepConfig(Checked):
    """A sweep: every cell is trained once per seed, all from the dense model of that seed."""

    title: str | None = Field(default=None, description="One line, for tables and reports.")
    about: str | None = Field(
        default=None, description="The question that the sweep answers, in a few sentences, for the report."
    )
    base: str | tuple[str, ...] = Field(description="Run config(s) that all runs start from.")
    output_dir: PathText | None = Field(
        default=None, description="Folder of the run folders; runs/<file name> if null."
    )
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1, description="Every cell is run once with each.")
    set: dict[str, Any] = Field(default={}, description="Config keys of all runs.")
    start: dict[str, Any] | None = Field(
        default={},
        description="Config keys of the dense run of each seed, from whose last epoch the cells start; null: there is none, the "
        "cells start from the weights of the base config (timm's pretrained ones).",
    )
    finetune: dict[str, Any] = Field(default={}, description="Config keys of all cells: the recipe they share.")
    keep_checkpoints: bool = Field(
        default=True, description="false: a cell's checkpoints are removed when it is done; the starts' stay."
    )
    executor: ExecutorConfig = Field(default=ExecutorConfig(), description="Where the runs are trained.")
    cells: tuple[CellConfig, ...] = Field(min_length=1, description="The settings to compare.")

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is given twice")
        return seeds
