"""Starts a sweep's runs on this machine: forked from a server that has imported everything, or by accelerate launch.

A run holds a lock on its log file as long as it lives, so that two sweeps on one folder don't train the same run twice.
docs/design.md explains why submitit's local executor is not used here.
"""

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from typing import IO, Protocol

from vit_tucker.config.load import dump_config
from vit_tucker.config.plugins import plugin_arguments
from vit_tucker.sweep.command import SCRIPT, run_command
from vit_tucker.sweep.plan import Job
from vit_tucker.sweep.status import last_words

PRELOADED = [
    "vit_tucker.run.run",
    "vit_tucker.run.main",
    "torch.utils.tensorboard",
    "sklearn.datasets",
    "sklearn.model_selection",
]


@dataclass
class StartedRun(ABC):
    """A run that an executor has started.

    Attributes:
        job: the run.
        log_start: bytes that were in its log before.
    """

    job: Job
    log_start: int

    @property
    @abstractmethod
    def status(self) -> int | None:
        """Returns the exit status; None until the run has ended."""

    @property
    def queued(self) -> bool:
        """Returns whether the run waits for a place, as far as is known."""
        return False

    @abstractmethod
    def describe_ending(self) -> str:
        """Returns how and why a run ended that is not done."""

    @abstractmethod
    def send(self, number: int) -> None:
        """Sends a signal to the run and to the processes it started."""


class Executor(Protocol):
    """Starts the runs of a sweep: as processes of this machine, or jobs of a cluster.

    Attributes:
        capacity: runs at a time.
        poll_seconds: between looks at them.
    """

    capacity: int
    poll_seconds: float

    def start(self, jobs: Sequence[Job]) -> Sequence[StartedRun | None]:
        """Starts (or continues) runs; None for one that another sweep runs."""


@dataclass
class RunProcess(StartedRun):
    """A run on this machine.

    Attributes:
        process: its process.
        gpu: the CUDA device that it was assigned.
    """

    process: "ForkServerProcess | subprocess.Popen[bytes]"
    gpu: str | None = None

    @property
    def status(self) -> int | None:
        """Returns the exit status, None while the run goes on."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def describe_ending(self) -> str:
        """Returns the exit status and the last line of the log."""
        return f"status {self.status}: {last_words(self.job.log, self.log_start)}; see {self.job.log}"

    def send(self, number: int) -> None:
        """Sends a signal to the run's process group."""
        if self.status is None and self.process.pid is not None:
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:  # it has not made its group yet, or is gone
                os.kill(self.process.pid, number)


@dataclass
class LocalExecutor:
    """Starts runs on this machine, which share its CPU threads and GPUs.

    Attributes:
        capacity: runs at a time.
        threads: CPU threads of each.
        gpus: CUDA devices, one of which each run is assigned; empty leaves them all to every run.
        launcher: see ``run_command``.
    """

    capacity: int = 1
    threads: int = 1
    gpus: tuple[str, ...] = ()
    launcher: str | None = None
    poll_seconds: float = 0.2
    _started: list[RunProcess] = field(default_factory=list, repr=False)

    def start(self, jobs: Sequence[Job]) -> list[RunProcess | None]:
        """Starts (or continues) runs; None for one that another sweep runs."""
        return [self._start(job) for job in jobs]

    def _start(self, job: Job) -> RunProcess | None:
        process: ForkServerProcess | subprocess.Popen[bytes]
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            if not _lock(log):
                return None
            used = [run.gpu for run in self._started if run.status is None]
            gpu = min(self.gpus, key=used.count) if self.gpus else None
            environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
            config, log_start = write_config(job), log.tell()
            if self.launcher is not None:
                command = run_command(["--cfg", config, *plugin_arguments(job.config.plugins)], self.launcher)
                every = os.environ | environment
                process = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env=every, start_new_session=True
                )
            else:
                server = multiprocessing.get_context("forkserver")  # its processes start in a second instead of ten
                server.set_forkserver_preload(PRELOADED)
                arguments = (config, job.config.plugins, str(job.log), self.threads, environment)
                process = server.Process(target=_train, args=arguments)
                fcntl.flock(log, fcntl.LOCK_UN)  # the process takes it over
                process.start()
        self._started.append(RunProcess(job, log_start, process, gpu))
        return self._started[-1]


def share_machine(jobs: int, launcher: str | None, gpus: Sequence[str]) -> LocalExecutor:
    """Returns an executor that divides CPU threads and GPUs among the runs that go on at a time.

    Args:
        jobs: runs at a time.
        launcher: see ``run_command``; a launcher chooses its GPUs itself.
        gpus: CUDA devices that are visible here.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return LocalExecutor(jobs, max(1, cores // jobs), tuple(gpus) if jobs > 1 and launcher is None else (), launcher)


def visible_gpus() -> list[str]:
    """Returns the CUDA devices, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


def write_config(job: Job) -> str:
    """Writes the config that a run is started with, seed0.yaml beside its folder, and returns its path."""
    config = job.folder.with_suffix(".yaml")
    config.write_text(dump_config(job.config))
    return str(config)


def _lock(log: IO[bytes]) -> bool:
    """Locks a run's log; returns False if another sweep has locked it."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _train(config: str, plugins: Sequence[str], log: str, threads: int, environment: dict[str, str]) -> None:
    """Trains the run of a config file in the forked process."""
    os.setsid()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with open(log, "ab") as opened:
        if not _lock(opened):
            sys.exit(0)  # another sweep was faster
        os.dup2(opened.fileno(), 1)
        os.dup2(opened.fileno(), 2)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        sys.exit(_call(config, plugins, threads))


def _call(config: str, plugins: Sequence[str], threads: int) -> int:
    import torch

    from vit_tucker.config.plugins import command_plugins
    from vit_tucker.run.main import train
    from vit_tucker.run.status import guarded

    torch.set_num_threads(threads)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a process started by hand
    sys.argv = [str(SCRIPT), "--cfg", config, *plugin_arguments(plugins)]

    def command() -> int:
        with command_plugins(plugins, trusted=False):
            return train(config)

    try:
        return guarded(command)
    except Exception:
        traceback.print_exc()
        return 1
