"""Runs a sweep's jobs, as many at a time as the executor takes, each when what it starts from is done."""

import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from vit_tucker.errors import ConfigError
from vit_tucker.storage.run_dir import RunDir
from vit_tucker.sweep.plan import Job
from vit_tucker.sweep.process import Executor, StartedRun
from vit_tucker.sweep.progress_table import Display
from vit_tucker.sweep.schema import START
from vit_tucker.sweep.status import State, Status, last_words, read_status, update_progress
from vit_tucker.training.interrupt import Signals, catch_signals
from vit_tucker.training.lock import RunLock

DRAW_SECONDS = 1.0


class Runner:
    """A sweep while it runs.

    Args:
        jobs: the runs, those that others need before these.
        statuses: of each, changed in place.
        executor: starts them.
        display: where it is shown.
        keep_checkpoints: of cells that are done.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        statuses: dict[tuple[str, int], Status],
        executor: Executor,
        display: Display,
        keep_checkpoints: bool = True,
    ):
        self._jobs, self._statuses, self._executor, self._display = jobs, statuses, executor, display
        self._keep_checkpoints = keep_checkpoints
        self._running: list[StartedRun] = []
        self._tried: set[tuple[str, int]] = set()
        self._signals = Signals()
        self._began = time.monotonic()
        self._finished = 0

    def run(self) -> int:
        """Run everything that is not done.

        Returns:
            0 if all is done, 1 if a run failed or is trained elsewhere, 130 after a signal.
        """
        with catch_signals(self._signals), self._killing_the_rest():
            drawn = forwarded = 0.0
            while True:
                self._collect()
                if self._signals.number and not forwarded:
                    forwarded = time.monotonic()
                    self._display.say(f"{signal.Signals(self._signals.number).name}: the runs save their state")
                    for process in self._running:
                        process.send(self._signals.number)
                if not self._signals.number:
                    self._fill()
                if not self._running:
                    break
                if time.monotonic() - drawn > DRAW_SECONDS:
                    drawn = time.monotonic()
                    for process in self._running:
                        status = self._statuses[process.job.key]
                        status.state = State.QUEUED if process.queued else State.RUNNING
                        update_progress(process.job, status)
                    self._display.draw(self._left())
                time.sleep(self._executor.poll_seconds)
        if self._signals.number:
            return 130
        return 0 if all(self._statuses[job.key].state is State.DONE for job in self._jobs) else 1

    @contextmanager
    def _killing_the_rest(self) -> Iterator[None]:
        """Runs that are left when this is left, by a second Ctrl-C or an error, don't outlive it."""
        try:
            yield
        finally:
            for process in self._running:
                process.send(signal.SIGKILL)

    def _fill(self) -> None:
        """Start runs while there are free places."""
        ready = self._ready()[: max(0, self._executor.capacity - len(self._running))]
        self._tried |= {job.key for job in ready}
        for job, process in zip(ready, self._executor.start(ready) if ready else (), strict=True):
            status = self._statuses[job.key]
            if process is None:
                status.state, status.reason = State.ELSEWHERE, "another sweep runs it"
            else:
                status.state, status.reason = State.RUNNING, ""
                self._running.append(process)

    def _ready(self) -> list[Job]:
        """Jobs whose start is done; those that start from a failed run are blocked."""
        ready = []
        for job in self._jobs:
            status = self._statuses[job.key]
            if job.key in self._tried or status.state is State.DONE:
                continue
            before = State.DONE if job.after is None else self._statuses[job.after.key].state
            if before is State.DONE:
                ready.append(job)
            elif before in (State.FAILED, State.BLOCKED, State.ELSEWHERE):
                self._tried.add(job.key)
                status.state, status.reason = State.BLOCKED, f"what it starts from is not done: {before.value}"
        return ready

    def _collect(self) -> None:
        """Note the runs that have ended."""
        for process in list(self._running):
            code = process.status
            if code is None:
                continue
            self._running.remove(process)
            job, status = process.job, self._statuses[process.job.key]
            after = read_status(job, {})
            if after.state is State.DONE:
                self._finished += 1
                if not self._keep_checkpoints and job.name != START:
                    shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
            elif self._signals.number:
                after.state = State.INTERRUPTED
            elif code == 0:  # it found its log locked
                after.state, after.reason = State.ELSEWHERE, "another sweep runs it"
            elif (refusal := refused(job)) is not None:
                after.state, after.reason = State.ELSEWHERE, refusal
            else:
                after.state, after.reason = (
                    State.FAILED,
                    f"{process.ending}: {last_words(process.log, process.said)}; see {process.log}",
                )
            vars(status).update(vars(after))
            self._display.say(self._event(job, status))

    def _event(self, job: Job, status: Status) -> str:
        done = sum(self._statuses[each.key].state is State.DONE for each in self._jobs)
        what = f"{status.state.value}: {status.reason}" if status.reason else status.state.value
        if status.state is State.DONE:
            what = f"top-1 {status.top1:.2f}% in {status.seconds:.0f} s"
        return f"[{done}/{len(self._jobs)}] {job.name}, seed {job.seed}: {what}{self._left()}"

    def _left(self) -> str:
        """'; about 0:12:30 left', by the pace of the runs so far."""
        left = sum(
            self._statuses[job.key].state in (State.WAITING, State.INTERRUPTED, State.QUEUED, State.RUNNING)
            for job in self._jobs
        )
        if not self._finished or not left:
            return ""
        seconds = (time.monotonic() - self._began) / self._finished * left
        return f"; about {timedelta(seconds=round(seconds))} left"


def refused(job: Job) -> str | None:
    """Who trains in a run's folder beside the sweep, started by hand; None if nobody does."""
    try:
        RunLock(job.folder).refuse_held()
    except ConfigError as error:
        return str(error)
    return None


def read_statuses(
    jobs: Sequence[Job], recorded: Mapping[tuple[str, int], dict[str, Any]]
) -> dict[tuple[str, int], Status]:
    """Where all runs stand, see ``read_status``; a start of which only the record is here runs again if a cell needs it."""
    statuses = {job.key: read_status(job, recorded) for job in jobs}
    for job in jobs:
        start = job.after
        if (
            start is not None
            and statuses[job.key].state is not State.DONE
            and not RunDir(start.folder).results.is_file()
        ):
            statuses[start.key] = read_status(start, {})
    return statuses
