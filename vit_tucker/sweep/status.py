"""Reads from the run folders how far each run of a sweep has got."""

import csv
from collections.abc import Mapping, Sequence
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
from vit_tucker.show.measures import IMAGE_MEASURES, Measure, measures_in
from vit_tucker.storage.run_dir import RunDir
from vit_tucker.sweep.plan import Job

PLACES = frozenset({"model.checkpoint", "name"})
"""Keys that may differ between a sweep's run and its record: where things lay, and what they were called."""


class State(Enum):
    """The state of a run; the value is what users see."""

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
    """A run's state with its progress and results.

    Attributes:
        state: how far it has got.
        score: after the last epoch so far, top-1 in percent or perplexity; None before the first.
        epoch: finished epochs.
        reason: why it failed, is blocked or is trained elsewhere.
        seconds: training time of a finished run.
        measure: what the score is.
    """

    state: State
    score: float | None = None
    epoch: int = 0
    reason: str = ""
    seconds: float = 0.0
    measure: Measure = IMAGE_MEASURES[0]


def read_status(job: Job, recorded: Mapping[tuple[str, int], dict[str, Any]]) -> Status:
    """Returns the status of a run that this sweep has not started.

    Args:
        job: the run.
        recorded: results of runs whose folders need not be here, by cell and seed.

    Raises:
        ConfigError: its folder, or its record, holds a run with another config.
    """
    run_dir = RunDir(job.folder)
    check_folder(run_dir, job.config)
    if run_dir.results.is_file():
        results = read_results(run_dir.results)
    elif job.key in recorded:
        results = recorded[job.key]
        lines = changes_of_run(validate(Source(dict(results["config"]))), job.config)
        if changes := [line for line in lines if line.partition(":")[0] not in PLACES]:
            raise ConfigError(
                f"--done: {job.name}, seed {job.seed} was recorded with another config: {'; '.join(changes)}"
            )
    else:
        status = Status(State.INTERRUPTED if run_dir.config.is_file() else State.WAITING)
        update_progress(job, status)
        return status
    seconds, last = results.get("train_seconds", 0.0), results["last"]
    measure = measures_in(last)[0]
    return Status(State.DONE, last[measure.column], results["epochs"], seconds=seconds, measure=measure)


def read_statuses(
    jobs: Sequence[Job], recorded: Mapping[tuple[str, int], dict[str, Any]]
) -> dict[tuple[str, int], Status]:
    """Returns ``read_status`` of all runs; a start of which only the record is here runs again if a cell needs it."""
    statuses = {job.key: read_status(job, recorded) for job in jobs}
    for job in jobs:
        if job.after is None or statuses[job.key].state is State.DONE:
            continue
        if not RunDir(job.after.folder).results.is_file():
            statuses[job.after.key] = read_status(job.after, {})
    return statuses


def read_records(paths: Sequence[Path]) -> dict[tuple[str, int], dict[str, Any]]:
    """Returns the results that ``--done`` names, by cell and seed.

    Args:
        paths: see ``collect``.

    Raises:
        ConfigError: a path is missing, or holds no results.
    """
    try:
        return {(run["name"], run["config"]["seed"]): run for run in (collect(paths).results if paths else ())}
    except ConfigError as error:
        raise ConfigError(f"--done: {error}") from None


def update_progress(job: Job, status: Status) -> None:
    """Updates a status with the epochs that the run has finished, from its summary.csv."""
    try:
        with (job.folder / "summary.csv").open() as opened:
            rows = list(csv.DictReader(opened))
    except OSError:
        return
    measure = measures_in(rows[0])[0] if rows else status.measure
    scores = [score for row in rows if (score := row.get(measure.column))]
    status.epoch, status.score, status.measure = len(rows), float(scores[-1]) if scores else None, measure


def last_words(log: Path, start: int = 0) -> str:
    """Returns why a run ended: the last line that names an error, else the last line of its output.

    Args:
        log: what it printed, and runs before it.
        start: bytes of those.
    """
    try:
        text = log.read_bytes()[start:].decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower()]
    return (errors or lines or ["no output"])[-1].removeprefix("error: ")[:300]
