"""``python -m vit_tucker.cli.launch``: accelerate launch, whose failures end in the run's own line and exit status.

It has the arguments of accelerate launch. What can be known before the processes start is checked before: the config, and that
the global batch and the GPUs are enough for them. A launcher of torch ends with status 1 and its own traceback otherwise.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vit_tucker.cli.common import parse_with_overrides, run_command, split_model
from vit_tucker.cli.train import train_parser
from vit_tucker.run.status import guarded
from vit_tucker.sweep.command import SCRIPT


def main(argv: Sequence[str] | None = None) -> int:
    """Starts the processes and returns the exit status: that of what went wrong in them.

    Args:
        argv: as for ``accelerate launch``.
    """
    # torch's launcher logs each process that failed, of which the run has said why
    os.environ.setdefault("LOGLEVEL", "CRITICAL")
    words = sys.argv[1:] if argv is None else list(argv)
    script = next((place for place, word in enumerate(words) if Path(word).name == SCRIPT.name), None)
    if script is not None and (status := guarded(lambda: check(words[: script + 1], words[script + 1 :]))):
        return status
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # where it does not read the variable
    try:
        launch_command(launch_command_parser().parse_args(words))
    except ChildFailedError as error:
        return status_of({rank: failure.exitcode for rank, failure in error.failures.items()})
    except subprocess.CalledProcessError as error:
        return status_of({0: error.returncode})
    except SignalException:  # the processes have saved their state, and said so
        return 130
    return 0


def status_of(codes: Mapping[int, int]) -> int:
    """Returns the exit status of processes that failed: 2 for a mistake of the user, 130 after a signal to all, else 1.

    Args:
        codes: exit status by process; negative for a process that a signal killed, which could not say so.
    """
    if 2 in codes.values():
        return 2
    if 130 in codes.values():
        return 130
    if all(code < 0 for code in codes.values()):
        rank, code = next(iter(codes.items()))
        print(f"error: process {rank} was killed by {signal.Signals(-code).name}", file=sys.stderr)
    return 1


def check(launch: Sequence[str], words: Sequence[str]) -> int:
    """Checks a run before its processes are started.

    Args:
        launch: arguments of accelerate launch, up to the script.
        words: those of the command ``train``.

    Returns:
        0, the exit status.

    Raises:
        ConfigError: a bad config; or the global batch or the GPUs don't suffice for the processes.
    """
    args = parse_with_overrides(train_parser(), words)
    return run_command(args, lambda given: check_run(given, launch))


def check_run(args: argparse.Namespace, launch: Sequence[str]) -> int:
    """Reads the run's config and compares it with the launch.

    Args:
        args: of the command ``train``.
        launch, and what it returns and raises: see ``check``.
    """
    from vit_tucker.config.target import read_run

    model, overrides = split_model(args, "MODEL and --cfg")
    recipe = read_run(args.cfg, model, args.method, overrides)[0].train
    import torch  # after it: a mistake is reported before torch is imported
    from accelerate.commands.launch import launch_command_parser

    from vit_tucker.data.sampler import refuse_uneven
    from vit_tucker.run.accelerator import refuse_missing_gpus

    launched = launch_command_parser().parse_args(launch)
    processes, machines = launched.num_processes or 1, launched.num_machines or 1
    if not args.evaluate:
        refuse_uneven(recipe.global_batch_size, processes, recipe.grad_accum_steps)
    if not (recipe.cpu or args.device == "cpu" or launched.cpu):
        refuse_missing_gpus(processes // machines, torch.cuda.device_count())
    return 0


if __name__ == "__main__":
    sys.exit(main())
