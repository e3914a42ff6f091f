"""The command of one run, with or without accelerate launch. Imports nothing heavy: a cluster's job makes it on its own node."""

import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from vit_tucker.errors import ConfigError

SCRIPT = Path("experiments/train_vit.py")


def run_command(arguments: Sequence[str], launcher: str | None) -> list[str]:
    """Returns the command that trains a run.

    Args:
        arguments: of the command ``train``.
        launcher: arguments of accelerate launch, as one string; None for one process without a launcher.
    """
    if launcher is None:
        return [sys.executable, "-m", "vit_tucker", "train", *arguments]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *launch_arguments(launcher)]
    return [*launch, str(script()), *arguments]


def launch_arguments(launcher: str) -> list[str]:
    """Returns the launcher's arguments, with a free port where several processes meet and none is named."""
    arguments = shlex.split(launcher)
    if any(argument.startswith("--main_process_port") for argument in arguments):
        return arguments
    with socket.socket() as probe:
        probe.bind(("", 0))
        return [*arguments, "--main_process_port", str(probe.getsockname()[1])]


def script() -> Path:
    """Returns experiments/train_vit.py of here, else of the source checkout.

    Raises:
        ConfigError: neither is there.
    """
    for root in (Path(), Path(__file__).resolve().parents[2]):
        if (root / SCRIPT).is_file():
            return root / SCRIPT
    raise ConfigError(f"--launch: {SCRIPT} is neither here nor in the package's checkout")
