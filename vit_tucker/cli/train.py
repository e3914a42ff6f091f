"""``train`` and ``experiments/train_vit.py``: train, continue or evaluate one run."""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_tucker.cli.common import OVERRIDES_HELP, Parser, add_plugins, guarded, parse_with_overrides, run_command
from vit_tucker.errors import StoppedError

DESCRIPTION = (
    "Train a timm ViT, dense or with another attention. The same command on the same folder continues the run."
)


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "train", help="train, continue or evaluate one run from a config", description=DESCRIPTION
    )
    add_arguments(parser)
    parser.set_defaults(run=train)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--cfg", required=True, help="config file, name below experiments/configs, or a run folder")
    parser.add_argument("--evaluate", action="store_true", help="evaluate only: the run's best weights, or the start")
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="continue the folder's run with this config even if it began with another",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan: model, patch, groups, steps, memory")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help=OVERRIDES_HELP)


def train_main(argv: Sequence[str] | None = None) -> int:
    """``experiments/train_vit.py`` and ``./run.sh train``."""
    parser = Parser(prog="train_vit.py", description=DESCRIPTION)
    add_arguments(parser)
    add_plugins(parser)
    args = parse_with_overrides(parser, argv)
    return guarded(lambda: run_command(args, train))


def train(args: argparse.Namespace) -> int:
    """The command itself."""
    from vit_tucker.config.load import load_config
    from vit_tucker.run import run

    config = load_config(args.cfg, args.overrides)
    if Path(args.cfg).is_dir():
        config = config.model_copy(update={"output_dir": str(Path(args.cfg))})
    try:
        run(config, args.evaluate, args.allow_changes, args.dry_run)
    except StoppedError as stop:
        command = resume_command(str(config.output_dir), config.plugins)
        raise StoppedError(f"{stop}; the same command continues{f', or: {command}' if command else ''}") from None
    return 0


def resume_command(folder: str, plugins: Sequence[str] = ()) -> str | None:
    """The command that continues a run here, on as many processes as now and with its plug-ins; None on several machines."""
    from vit_tucker.config.plugins import plugin_arguments

    processes, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if processes != here:
        return None
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    own = sys.argv[0].endswith(".py") and Path(sys.argv[0]).name != "__main__.py"
    script = [sys.argv[0]] if own else ["-m", "vit_tucker", "train"]
    launcher = [python, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    return shlex.join(
        [*(launcher if processes > 1 else [python]), *script, "--cfg", folder, *plugin_arguments(plugins)]
    )
