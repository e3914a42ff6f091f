"""The runs of a sweep on this machine: forked from a server that has imported everything, or started by accelerate launch.

submitit's local executor would do this too, but imports everything anew for each run: 8 tiny digits runs,
2 at a time, took 117 s with it and 27 s with the fork server (one pair of sweeps on a busy machine). A run holds a lock
on its log file as long as it lives, so that two sweeps on one folder don't train the same run twice.
"""

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import IO, Protocol

from vit_tucker.config.load import dump_config
from vit_tucker.config.plugins import plugin_arguments
from vit_tucker.sweep.command import SCRIPT, run_command
from vit_tucker.sweep.plan import Job

PRELOADED = [
    "vit_tucker.run.run",
    "vit_tucker.run.main",
    "torch.utils.tensorboard",
    "sklearn.datasets",
    "sklearn.model_selection",
]


class StartedRun(Protocol):
    """A run that an executor has started.

    Attributes:
        job: the run.
        log: file with all that it prints.
        said: bytes that were in it before.
    """

    job: Job
    log: Path
    said: int

    @property
    def status(self) -> int | None:
        """Exit status; None until it has ended."""

    @property
    def queued(self) -> bool:
        """Whether it waits for a place."""

    @property
    def ending(self) -> str:
        """How it ended, for people."""

    def send(self, number: int) -> None:
        """Sends a signal to it and to the processes it started."""


class Executor(Protocol):
    """Starts runs somewhere.

    Attributes:
        capacity: runs at a time.
        poll_seconds: between looks at them.
    """

    capacity: int
    poll_seconds: float

    def start(self, jobs: Sequence[Job]) -> Sequence[StartedRun | None]:
        """Starts (or continues) runs; None for one that another sweep runs."""


@dataclass
class RunProcess:
    """A run on this machine; see ``StartedRun``."""

    job: Job
    log: Path
    said: int
    process: "ForkServerProcess | subprocess.Popen[bytes]"
    gpu: str | None = None
    queued: bool = False

    @property
    def status(self) -> int | None:
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    @property
    def ending(self) -> str:
        return f"status {self.status}"

    def send(self, number: int) -> None:
        if self.status is None and self.process.pid is not None:
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:  # it has not made its group yet, or is gone
                os.kill(self.process.pid, number)


@dataclass
class LocalExecutor:
    """Runs on this machine, which share its CPU threads and GPUs.

    Attributes:
        capacity: runs at a time.
        threads: CPU threads of each.
        gpus: CUDA devices, dealt to the runs; empty leaves them all to every run.
        launcher: arguments of accelerate launch, as one string; None for one process without a launcher.
    """

    capacity: int = 1
    threads: int = 1
    gpus: tuple[str, ...] = ()
    launcher: str | None = None
    poll_seconds: float = 0.2
    _started: list[RunProcess] = field(default_factory=list, repr=False)

    def start(self, jobs: Sequence[Job]) -> list[RunProcess | None]:
        """Starts (or continues) runs, see ``Executor``."""
        return [self._start(job) for job in jobs]

    def _start(self, job: Job) -> RunProcess | None:
        log = lock(job)
        if log is None:
            return None
        self._started = [run for run in self._started if run.status is None]
        used = [run.gpu for run in self._started]
        gpu = min(self.gpus, key=used.count) if self.gpus else None
        environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        process: ForkServerProcess | subprocess.Popen[bytes]
        with log:
            config, said = write_config(job), log.tell()
            if self.launcher is not None:
                command = run_command(["--cfg", config, *plugin_arguments(job.config.plugins)], self.launcher)
                process = subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **environment},
                    start_new_session=True,
                )
            else:
                arguments = (config, job.config.plugins, str(log_file(job)), self.threads, environment)
                process = fork_server().Process(target=_train, args=arguments)
                fcntl.flock(log, fcntl.LOCK_UN)  # the process takes it over
                process.start()
        self._started.append(RunProcess(job, log_file(job), said, process, gpu))
        return self._started[-1]


def share_machine(jobs: int, launcher: str | None, gpus: Sequence[str]) -> LocalExecutor:
    """Divides CPU threads and GPUs among the runs that go on at a time.

    Args:
        jobs: runs at a time.
        launcher: see ``LocalExecutor``; a launcher chooses its GPUs itself.
        gpus: CUDA devices that are visible here.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return LocalExecutor(jobs, max(1, cores // jobs), tuple(gpus) if jobs > 1 and launcher is None else (), launcher)


def visible_gpus() -> list[str]:
    """Returns CUDA devices, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


def log_file(job: Job) -> Path:
    """Returns where a run's output goes: seed0.log beside the folder seed0."""
    return job.folder.with_name(f"{job.folder.name}.log")


def write_config(job: Job) -> str:
    """Writes the config that a run is started with, seed0.yaml beside its folder, and returns its path."""
    config = job.folder.with_name(f"{job.folder.name}.yaml")
    config.write_text(dump_config(job.config))
    return str(config)


def lock(job: Job) -> IO[bytes] | None:
    """Opens and locks a run's log; None if another sweep runs it."""
    file = log_file(job)
    file.parent.mkdir(parents=True, exist_ok=True)
    opened = file.open("ab")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        opened.close()
        return None
    return opened


def fork_server() -> ForkServerContext:
    """Returns a context whose processes start in a second instead of ten."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _train(config: str, plugins: Sequence[str], log: str, threads: int, environment: dict[str, str]) -> None:
    """In the forked process: the run of a config file."""
    os.setsid()
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    with open(log, "ab") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
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
