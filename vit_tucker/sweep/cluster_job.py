"""Supervises one run as a cluster's job: has it save when the cluster wants the node back, and queues it again.

submitit pickles it, starts it on the node and calls ``checkpoint`` at the signal. The run is a process of its own, since it has
handlers of its own. Nothing heavy is imported here. experiments/slurm/train.sbatch describes who gets which signal.
"""

import dataclasses
import os
import signal
import subprocess
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from vit_tucker.sweep.command import run_command

WARNING = signal.SIGUSR1
"""Training runs save at it; SUBMITIT_PREEMPT_SIGNAL has its name."""
POLL_SECONDS = 0.2
ASK_SECONDS = 1.0
"""Interval between warnings: a run that is still importing has no handler yet, so that it is asked until it leaves."""
PAIR_SECONDS = 2.0
"""Wait for a second signal: a pre-emption may send SIGTERM first and the warning after it."""


@dataclasses.dataclass
class ClusterJob:
    """One run of a sweep as a cluster's job.

    Attributes:
        arguments: of the command ``train``.
        folder: of the run.
        log: file for all that it prints.
        launcher: see ``run_command``.
        limit_seconds: time after which the cluster warns that the limit is reached.
    """

    arguments: tuple[str, ...]
    folder: str
    log: str
    launcher: str | None
    limit_seconds: float
    _process: "subprocess.Popen[bytes] | None" = dataclasses.field(default=None, init=False, repr=False)
    _before: str | None = dataclasses.field(default=None, init=False, repr=False)
    _began: float = dataclasses.field(default=0.0, init=False, repr=False)
    _asked: bool = dataclasses.field(default=False, init=False, repr=False)

    def __call__(self) -> int:
        """Trains, and returns the exit status."""
        self._began, self._before = time.monotonic(), newest_checkpoint(self.folder)
        terminate = signal.signal(signal.SIGTERM, lambda *_: self._ask())
        # a cluster may warn all processes of a job, also a launcher, or a run before it has a handler
        ignore_warning = partial(signal.signal, WARNING, signal.SIG_IGN)
        with open(self.log, "ab") as log:
            command = run_command(self.arguments, self.launcher)
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=ignore_warning
            )
        try:
            while not has_ended(self._process.pid):
                time.sleep(POLL_SECONDS)
            if self._asked and not self._finished:
                time.sleep(PAIR_SECONDS)
        finally:
            signal.signal(signal.SIGTERM, terminate)
            if not has_ended(self._process.pid):  # Ctrl-C in a local or debug job
                os.killpg(self._process.pid, signal.SIGTERM)
        return self._process.wait()

    def checkpoint(self) -> Any:
        """Makes the run save and stop, at the cluster's warning; called by submitit.

        Returns:
            What is queued again (a DelayedSubmission); None if the run is finished, or wrote no checkpoint in all its time.
        """
        from submitit.helpers import DelayedSubmission

        while self._process is not None and not has_ended(self._process.pid):
            self._ask()
            time.sleep(ASK_SECONDS)
        if self._finished:
            return None
        if time.monotonic() - self._began >= self.limit_seconds and newest_checkpoint(self.folder) == self._before:
            with open(self.log, "a") as log:
                log.write("error: no checkpoint was written before the time limit; not queued again: more executor.time=, or "
                          "train.checkpoint_steps=\n")  # fmt: skip
            return None
        return DelayedSubmission(dataclasses.replace(self))

    @property
    def _finished(self) -> bool:
        return os.path.isfile(os.path.join(self.folder, "results.json"))

    def _ask(self) -> None:
        """Sends the warning to the training processes, past their launcher, which would die of it."""
        self._asked = True
        if self._process is not None:
            for process in [self._process.pid] if self.launcher is None else children(self._process.pid):
                with suppress(ProcessLookupError):
                    os.kill(process, WARNING)


def has_ended(process: int) -> bool:
    """Returns whether a child has ended; leaves it to be waited for, so that a signal's handler may ask too."""
    try:
        return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def children(process: int) -> list[int]:
    """Returns the processes that a process has started."""
    found: list[int] = []
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, file.read_text().split())
    return found


def newest_checkpoint(folder: str) -> str | None:
    """Returns the name of a run's last checkpoint; None if there is none."""
    try:
        return os.readlink(os.path.join(folder, "checkpoints", "last"))
    except OSError:
        return None
