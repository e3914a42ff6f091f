"""Runs in processes of their own, forked from a server that has imported everything: a start takes a second instead of ten.

They are real processes with real signals, exit statuses and, for several, the environment that torchrun gives its workers.
"""

import contextlib
import multiprocessing
import os
import re
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(
    [
        "vit_tucker.run.run",
        "vit_tucker.config.load",
        "sklearn.datasets",
        "sklearn.model_selection",
        "torch.utils.tensorboard",
    ]
)


def train_unshown(arguments: Sequence[str]) -> int:
    """Train as `train_vit.py --cfg NAME OVERRIDES` does, without TensorBoard, whose pictures take most of the time."""
    from vit_tucker.config.load import load_config
    from vit_tucker.run.run import run
    from vit_tucker.training.monitor import NullMonitor

    run(load_config(arguments[1], arguments[2:]), monitor=NullMonitor())
    return 0


def train(arguments: Sequence[str], output: str, environment: dict[str, str], shown: bool = True) -> None:
    """`train_vit.py` with these arguments."""
    from vit_tucker.cli import train_main

    command = train_main if shown else train_unshown
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a process started by hand
    os.environ.update(environment)
    sys.argv = ["experiments/train_vit.py", *arguments]
    with open(output, "a", buffering=1) as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = command(arguments)
        except Exception:
            traceback.print_exc()
            status = 1
    sys.exit(status)


def start(arguments: Sequence[str], output: Path, shown: bool = True, **environment: str) -> multiprocessing.Process:
    """Start one process; what it prints is added to the file ``output``."""
    process = fork.Process(target=train, args=(list(arguments), str(output), environment, shown))
    process.start()
    return process


def worker_environments(count: int, **environment: str) -> list[dict[str, str]]:
    """What torchrun tells its workers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = environment | {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(count)]


def start_all(count: int, arguments: Sequence[str], output: Path, **environment: str) -> list[multiprocessing.Process]:
    """Start the processes of one run, as torchrun would."""
    if count == 1:
        return [start(arguments, output, **environment)]
    return [start(arguments, output, **worker) for worker in worker_environments(count, **environment)]


def finish(processes: Sequence[multiprocessing.Process], seconds: float = 120) -> list[int | None]:
    """Exit statuses; None and a kill for what has not ended in time."""
    for process in processes:
        process.join(timeout=seconds)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return statuses


def saved_steps(folder: Path) -> int:
    """Steps of the newest checkpoint of a run, half-written ones included."""
    names = re.findall(r"step-(\d+)", " ".join(p.name for p in folder.glob("checkpoints/*")))
    return max(map(int, names), default=0)
