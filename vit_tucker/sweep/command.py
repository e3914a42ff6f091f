"""Builds the command of one run, with or without accelerate launch. Imports nothing heavy: a cluster's node uses it too."""

import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from vit_tucker.errors import ConfigError

SCRIPT = Path("experiments/train_vit.py")
CHECKOUT = Path(__file__).resolve().parents[2]
"""Folder that the package lies in."""


def run_command(arguments: Sequence[str], launcher: str | None) -> list[str]:
    """Returns the command that trains a run.

    Args:
        arguments: of the command ``train``.
        launcher: arguments of accelerate launch, as one string; None for one process without a launcher.

    Raises:
        ConfigError: the script to launch is neither here nor in the source checkout.
    """
    if launcher is None:
        return [sys.executable, "-m", "vit_tucker", "train", *arguments]
    launch = [sys.executable, "-m", "vit_tucker.cli.launch", *launch_arguments(launcher)]
    for root in (Path(), CHECKOUT):
        if (root / SCRIPT).is_file():
            return [*launch, str(root / SCRIPT), *arguments]
    raise ConfigError(f"--launch: {SCRIPT} is neither here nor in the package's checkout")


def launch_arguments(launcher: str) -> list[str]:
    """Returns the launcher's arguments, with a free port where several processes meet and none is named."""
    arguments = shlex.split(launcher)
    if any(argument.startswith("--main_process_port") for argument in arguments):
        return arguments
    with socket.socket() as free:
        free.bind(("", 0))
        return [*arguments, "--main_process_port", str(free.getsockname()[1])]
