"""Runs a sweep's jobs, as many at a time as the executor has room for, each when what it starts from is done."""

import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from vit_tucker.errors import ConfigError
from vit_tucker.sweep.plan import Job
from vit_tucker.sweep.process import Executor, StartedRun
from vit_tucker.sweep.progress_table import Display
from vit_tucker.sweep.schema import START
from vit_tucker.sweep.status import State, Status, read_status, update_progress
from vit_tucker.training.interrupt import Signals, catch_signals
from vit_tucker.training.lock import RunLock

DRAW_SECONDS = 1.0


@dataclass
class Runner:
    """Trains the runs of a sweep.

    Attributes:
        jobs: the runs, those that others need before these.
        statuses: of each, changed in place.
        executor: starts them.
        display: where their progress is shown.
        keep_checkpoints: whether cells that are done keep theirs.
    """

    jobs: Sequence[Job]
    statuses: dict[tuple[str, int], Status]
    executor: Executor
    display: Display
    keep_checkpoints: bool = True
    _running: list[StartedRun] = field(default_factory=list, init=False)
    _tried: set[tuple[str, int]] = field(default_factory=set, init=False)
    _signals: Signals = field(default_factory=Signals, init=False)
    _began: float = field(default_factory=time.monotonic, init=False)
    _finished: int = field(default=0, init=False)

    def run(self) -> int:
        """Runs everything that is not done.

        Returns:
            0 if all is done, 1 if a run failed or is trained elsewhere, 130 after a signal.
        """
        with catch_signals(self._signals):
            try:
                self._run_all()
            finally:  # a second Ctrl-C or an error: no run outlives the sweep
                for process in self._running:
                    process.send(signal.SIGKILL)
        if self._signals.number:
            return 130
        return 0 if all(self.statuses[job.key].state is State.DONE for job in self.jobs) else 1

    def _run_all(self) -> None:
        drawn, forwarded = 0.0, False
        while True:
            self._collect()
            if not self._signals.number:
                self._fill()
            elif not forwarded:
                forwarded = True
                self.display.say(f"{signal.Signals(self._signals.number).name}: the runs save their state")
                for process in self._running:
                    process.send(self._signals.number)
            if not self._running:
                return
            if time.monotonic() - drawn > DRAW_SECONDS:
                drawn = time.monotonic()
                for process in self._running:
                    status = self.statuses[process.job.key]
                    status.state = State.QUEUED if process.queued else State.RUNNING
                    update_progress(process.job, status)
                self.display.draw(self._left())
            time.sleep(self.executor.poll_seconds)

    def _fill(self) -> None:
        """Starts runs while there are free places; what a cluster refuses has failed, unless nothing else is left."""
        ready = self._ready()[: max(0, self.executor.capacity - len(self._running))]
        self._tried |= {job.key for job in ready}
        try:
            started = self.executor.start(ready) if ready else ()
        except ConfigError as error:
            if not self._running:
                raise
            for job in ready:
                vars(self.statuses[job.key]).update(state=State.FAILED, reason=str(error))
                self.display.say(self._event(job, self.statuses[job.key]))
            return
        for job, process in zip(ready, started, strict=True):
            status = self.statuses[job.key]
            if process is None:
                status.state, status.reason = State.ELSEWHERE, "another sweep runs it"
            else:
                status.state, status.reason = State.RUNNING, ""
                self._running.append(process)

    def _ready(self) -> list[Job]:
        """Returns the jobs whose start is done; those that start from a failed run become blocked."""
        ready = []
        for job in self.jobs:
            status = self.statuses[job.key]
            if job.key in self._tried or status.state is State.DONE:
                continue
            before = State.DONE if job.after is None else self.statuses[job.after.key].state
            if before is State.DONE:
                ready.append(job)
            elif before in (State.FAILED, State.BLOCKED, State.ELSEWHERE):
                self._tried.add(job.key)
                status.state, status.reason = State.BLOCKED, f"what it starts from is not done: {before.value}"
        return ready

    def _collect(self) -> None:
        """Updates the statuses of the runs that have ended."""
        for process in list(self._running):
            code = process.status
            if code is None:
                continue
            self._running.remove(process)
            job, status = process.job, self.statuses[process.job.key]
            after = read_status(job, {})
            if after.state is State.DONE:
                self._finished += 1
                if not self.keep_checkpoints and job.name != START:
                    shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
            elif self._signals.number:
                after.state = State.INTERRUPTED
            elif code == 0:  # it found its log locked
                after.state, after.reason = State.ELSEWHERE, "another sweep runs it"
            else:
                try:
                    RunLock(job.folder).refuse_held()
                    after.state, after.reason = State.FAILED, process.describe_ending()
                except ConfigError as held:  # by a run that was started by hand
                    after.state, after.reason = State.ELSEWHERE, str(held)
            vars(status).update(vars(after))
            self.display.say(self._event(job, status))

    def _event(self, job: Job, status: Status) -> str:
        done = sum(self.statuses[each.key].state is State.DONE for each in self.jobs)
        what = f"{status.state.value}: {status.reason}" if status.reason else status.state.value
        if status.state is State.DONE:
            what = f"{status.measure.text(status.score or 0.0)} in {status.seconds:.0f} s"
        return f"[{done}/{len(self.jobs)}] {job.name}, seed {job.seed}: {what}{self._left()}"

    def _left(self) -> str:
        """Returns '; about 0:12:30 left', by the pace of the runs so far; nothing before the first has finished."""
        open_states = (State.WAITING, State.INTERRUPTED, State.QUEUED, State.RUNNING)
        left = sum(self.statuses[job.key].state in open_states for job in self.jobs)
        if not self._finished or not left:
            return ""
        seconds = (time.monotonic() - self._began) / self._finished * left
        return f"; about {timedelta(seconds=round(seconds))} left"
