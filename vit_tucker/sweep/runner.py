"""Runs a sweep's jobs, some at a time, each when what it starts from is done."""

import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from vit_tucker.errors import ConfigError
from vit_tucker.storage.run_dir import RunDir
from vit_tucker.sweep.plan import Job
from vit_tucker.sweep.process import RunProcess, start_run
from vit_tucker.sweep.progress_table import Display
from vit_tucker.sweep.schema import START
from vit_tucker.sweep.status import State, Status, last_words, read_status, update_progress
from vit_tucker.training.interrupt import Signals, catch_signals
from vit_tucker.training.lock import RunLock

POLL_SECONDS = 0.2
DRAW_SECONDS = 1.0


@dataclass(frozen=True)
class Slots:
    """What the runs of a sweep share.

    Attributes:
        jobs: runs at a time.
        threads: CPU threads of each.
        gpus: CUDA devices, dealt to the runs; empty leaves them all to every run.
        launcher: see ``start_run``.
        keep_checkpoints: of cells that are done.
    """

    jobs: int = 1
    threads: int = 1
    gpus: tuple[str, ...] = ()
    launcher: str | None = None
    keep_checkpoints: bool = True


class Runner:
    """A sweep while it runs.

    Args:
        jobs: the runs, those that others need before these.
        statuses: of each, changed in place.
        slots: what they share.
        display: where it is shown.
    """

    def __init__(self, jobs: Sequence[Job], statuses: dict[tuple[str, int], Status], slots: Slots, display: Display):
        self._jobs, self._statuses, self._slots, self._display = jobs, statuses, slots, display
        self._running: dict[int, RunProcess] = {}
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
                    for process in self._running.values():
                        process.send(self._signals.number)
                if not self._signals.number:
                    self._fill()
                if not self._running:
                    break
                if time.monotonic() - drawn > DRAW_SECONDS:
                    drawn = time.monotonic()
                    for process in self._running.values():
                        update_progress(process.job, self._statuses[process.job.key])
                    self._display.draw(self._left())
                time.sleep(POLL_SECONDS)
        if self._signals.number:
            return 130
        return 0 if all(self._statuses[job.key].state is State.DONE for job in self._jobs) else 1

    @contextmanager
    def _killing_the_rest(self) -> Iterator[None]:
        """Runs that are left when this is left, by a second Ctrl-C or an error, don't outlive it."""
        try:
            yield
        finally:
            for process in self._running.values():
                process.send(signal.SIGKILL)

    def _fill(self) -> None:
        """Start runs while there are free slots."""
        for job in self._jobs:
            if len(self._running) >= self._slots.jobs:
                return
            status = self._statuses[job.key]
            if job.key in self._tried or status.state is State.DONE:
                continue
            before = None if job.after is None else self._statuses[job.after.key]
            if before is not None and before.state is not State.DONE:
                if before.state in (State.FAILED, State.BLOCKED, State.ELSEWHERE):
                    self._tried.add(job.key)
                    status.state, status.reason = (
                        State.BLOCKED,
                        f"what it starts from is not done: {before.state.value}",
                    )
                continue
            self._start(job, status)

    def _start(self, job: Job, status: Status) -> None:
        slot = next(number for number in range(self._slots.jobs) if number not in self._running)
        gpus = self._slots.gpus
        self._tried.add(job.key)
        process = start_run(job, self._slots.threads, gpus[slot % len(gpus)] if gpus else None, self._slots.launcher)
        if process is None:
            status.state, status.reason = State.ELSEWHERE, "another sweep runs it"
            return
        status.state, status.reason = State.RUNNING, ""
        self._running[slot] = process

    def _collect(self) -> None:
        """Note the runs that have ended."""
        for slot, process in list(self._running.items()):
            code = process.status
            if code is None:
                continue
            del self._running[slot]
            job, status = process.job, self._statuses[process.job.key]
            after = read_status(job, {})
            if after.state is State.DONE:
                self._finished += 1
                if not self._slots.keep_checkpoints and job.name != START:
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
                    f"status {code}: {last_words(process.log, process.said)}; see {process.log}",
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
            self._statuses[job.key].state in (State.WAITING, State.INTERRUPTED, State.RUNNING) for job in self._jobs
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


def share_machine(jobs: int, launcher: str | None, gpus: Sequence[str], keep_checkpoints: bool = True) -> Slots:
    """Divide CPU threads and GPUs among the runs that go on at a time.

    Args:
        jobs: runs at a time.
        launcher: see ``start_run``; a launcher chooses its GPUs itself.
        gpus: CUDA devices that are visible here.
        keep_checkpoints: of cells that are done.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    dealt = tuple(gpus) if jobs > 1 and launcher is None else ()
    return Slots(jobs, max(1, cores // jobs), dealt, launcher, keep_checkpoints)


def visible_gpus() -> list[str]:
    """CUDA devices, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


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
