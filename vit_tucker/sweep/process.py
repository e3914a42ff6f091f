"""One run of a sweep as a process of its own: forked from a server that has imported everything, or by accelerate launch.

A run holds a lock on its log file as long as it lives, so that two sweeps on one folder don't train the same run twice.
"""

import fcntl
import multiprocessing
import os
import shlex
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import IO

from vit_tucker.config.load import dump_config
from vit_tucker.config.plugins import plugin_arguments
from vit_tucker.errors import ConfigError
from vit_tucker.sweep.plan import Job

SCRIPT = Path("experiments/train_vit.py")
PRELOADED = [
    "vit_tucker.run.run",
    "vit_tucker.run.main",
    "torch.utils.tensorboard",
    "sklearn.datasets",
    "sklearn.model_selection",
]


class RunProcess:
    """A started run.

    Attributes:
        job: the run.
        log: file with all that it prints.
        said: bytes that were in it before.
    """

    def __init__(self, job: Job, log: Path, process: "ForkServerProcess | subprocess.Popen[bytes]", said: int):
        self.job, self.log, self._process = job, log, process
        self.said = said

    @property
    def status(self) -> int | None:
        """Exit status; None while it runs."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        return self._process.exitcode

    def send(self, number: int) -> None:
        """Send a signal to it and to the processes it started."""
        if self.status is None and self._process.pid is not None:
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:  # it has not made its group yet, or is gone
                os.kill(self._process.pid, number)


def log_file(job: Job) -> Path:
    """Where a run's output goes: seed0.log beside the folder seed0."""
    return job.folder.with_name(f"{job.folder.name}.log")


def lock(job: Job) -> IO[bytes] | None:
    """Open and lock a run's log; None if another sweep runs it."""
    file = log_file(job)
    file.parent.mkdir(parents=True, exist_ok=True)
    opened = file.open("ab")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        opened.close()
        return None
    return opened


def start_run(job: Job, threads: int, gpu: str | None, launcher: str | None) -> RunProcess | None:
    """Start (or continue) a run.

    Args:
        job: the run.
        threads: CPU threads of its process.
        gpu: what CUDA_VISIBLE_DEVICES should be; None leaves it.
        launcher: arguments of accelerate launch, as one string; None for one process without a launcher.

    Returns:
        The process; None if another sweep runs it.
    """
    config = job.folder.with_name(f"{job.folder.name}.yaml")
    log = lock(job)
    if log is None:
        return None
    with log:
        config.write_text(dump_config(job.config))
        said = log.tell()
        environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        if launcher is not None:
            arguments = ["--cfg", str(config), *plugin_arguments(job.config.plugins)]
            return RunProcess(job, log_file(job), _launch(arguments, log, launcher, environment), said)
        context = fork_server()
        process = context.Process(
            target=_train, args=(str(config), job.config.plugins, str(log_file(job)), threads, environment)
        )
        fcntl.flock(log, fcntl.LOCK_UN)  # the process takes it over
        process.start()
        return RunProcess(job, log_file(job), process, said)


def fork_server() -> ForkServerContext:
    """Its processes start in a second instead of ten."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _launch(
    arguments: Sequence[str], log: IO[bytes], launcher: str, environment: dict[str, str]
) -> "subprocess.Popen[bytes]":
    launch = [sys.executable, "-m", "accelerate.commands.launch", *launch_arguments(launcher)]
    command = [*launch, str(script()), *arguments]
    return subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment}, start_new_session=True
    )


def launch_arguments(launcher: str) -> list[str]:
    """The launcher's arguments, with a free port where several processes meet and none is named."""
    arguments = shlex.split(launcher)
    if any(argument.startswith("--main_process_port") for argument in arguments):
        return arguments
    with socket.socket() as probe:
        probe.bind(("", 0))
        return [*arguments, "--main_process_port", str(probe.getsockname()[1])]


def script() -> Path:
    """experiments/train_vit.py of here, else of the source checkout.

    Raises:
        ConfigError: neither is there.
    """
    for root in (Path(), Path(__file__).resolve().parents[2]):
        if (root / SCRIPT).is_file():
            return root / SCRIPT
    raise ConfigError(f"--launch: {SCRIPT} is neither here nor in the package's checkout")


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
