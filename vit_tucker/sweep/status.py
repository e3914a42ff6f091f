"""Where each run of a sweep stands, from its folder."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from vit_tucker.config.load import validate
from vit_tucker.config.source import Source
from vit_tucker.errors import ConfigError
from vit_tucker.report.collect import collect
from vit_tucker.report.compare import read_results
from vit_tucker.run.same_run import changes_of_run, check_folder
from vit_tucker.storage.run_dir import RunDir
from vit_tucker.sweep.plan import Job

PLACES = frozenset({"model.checkpoint", "name"})
"""Keys that may differ between a sweep's run and its record: where things lay, and what they were called."""


class State(Enum):
    """Where a run stands."""

    WAITING = "waiting"
    QUEUED = "queued"
    RUNNING = "running"
    ELSEWHERE = "elsewhere"
    INTERRUPTED = "interrupted"
    BLOCKED = "blocked"
    FAILED = "failed"
    DONE = "done"


@dataclass
class Status:
    """A run's state, and what there is to say.

    Attributes:
        state: where it stands.
        top1: after the last epoch so far, in percent; None before the first.
        epoch: finished epochs.
        reason: why it failed or is blocked.
        seconds: training time of a finished run.
    """

    state: State
    top1: float | None = None
    epoch: int = 0
    reason: str = ""
    seconds: float = 0.0


def read_status(job: Job, recorded: Mapping[tuple[str, int], dict[str, Any]]) -> Status:
    """Where a run stands before the sweep starts.

    Args:
        job: the run.
        recorded: results of runs whose folders need not be here, by cell and seed.

    Raises:
        ConfigError: its folder, or its record, holds a run with another config.
    """
    run_dir = RunDir(job.folder)
    check_folder(run_dir, job.config)
    if run_dir.results.is_file():
        return finished(read_results(run_dir.results))
    if (results := recorded.get(job.key)) is not None:
        refuse_other_sweep(job, results)
        return finished(results)
    status = Status(State.INTERRUPTED if run_dir.config.is_file() else State.WAITING)
    update_progress(job, status)
    return status


def finished(results: dict[str, Any]) -> Status:
    """The status of a run with results."""
    return Status(
        State.DONE, results["last"]["eval_top1"], results["epochs"], seconds=results.get("train_seconds", 0.0)
    )


def refuse_other_sweep(job: Job, results: dict[str, Any]) -> None:
    """Raise ConfigError if a record is of another config."""
    lines = changes_of_run(validate(Source(dict(results["config"]))), job.config)
    if changes := [line for line in lines if line.partition(":")[0] not in PLACES]:
        raise ConfigError(f"--done: {job.name}, seed {job.seed} was recorded with another config: {'; '.join(changes)}")


def read_records(paths: Sequence[Path]) -> dict[tuple[str, int], dict[str, Any]]:
    """Results by cell and seed, see ``collect`` for what the paths may be.

    Raises:
        ConfigError: a path is missing, or holds no results.
    """
    try:
        return {(run["name"], run["config"]["seed"]): run for run in (collect(paths).results if paths else ())}
    except ConfigError as error:
        raise ConfigError(f"--done: {error}") from None


def update_progress(job: Job, status: Status) -> None:
    """Take over the epochs that a run has finished, from its summary.csv."""
    try:
        with (job.folder / "summary.csv").open() as opened:
            rows = list(csv.DictReader(opened))
    except OSError:
        return
    scores = [row["eval_top1"] for row in rows if row.get("eval_top1")]
    status.epoch, status.top1 = len(rows), float(scores[-1]) if scores else None


def last_words(log: Path, start: int = 0) -> str:
    """Why a run ended: the last line that names an error, else the last line of its output.

    Args:
        log: what it printed, and runs before it.
        start: bytes of those.
    """
    try:
        lines = [
            line.strip() for line in log.read_bytes()[start:].decode(errors="replace").splitlines() if line.strip()
        ]
    except OSError:
        return ""
    errors = [line for line in lines if "error:" in line.lower()]
    return (errors or lines or ["no output"])[-1].removeprefix("error: ")[:300]


def count_states(statuses: Iterable[Status]) -> str:
    """'12 done, 2 running, 4 waiting'"""
    states = [status.state for status in statuses]
    return ", ".join(f"{states.count(state)} {state.value}" for state in reversed(State) if state in states)
