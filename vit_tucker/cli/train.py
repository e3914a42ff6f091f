"""``train`` and ``experiments/train_vit.py``: train, continue or evaluate one run."""

import argparse
from collections.abc import Sequence
from typing import Any

from vit_tucker.cli.common import OVERRIDES_HELP, Parser, add_plugins, parse_with_overrides, run_command
from vit_tucker.run.status import guarded

DESCRIPTION = (
    "Train a timm ViT, dense or with another attention. The same command on the same folder continues the run."
)


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "train", help="train, continue or evaluate one run from a config", description=DESCRIPTION
    )
    add_arguments(parser)
    parser.set_defaults(run=train)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``train``."""
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
    """Runs ``train`` as ``experiments/train_vit.py`` and ``./run.sh train`` do; returns the exit status."""
    parser = Parser(prog="train_vit.py", description=DESCRIPTION)
    add_arguments(parser)
    add_plugins(parser)
    args = parse_with_overrides(parser, argv)
    return guarded(lambda: run_command(args, train))


def train(args: argparse.Namespace) -> int:
    """Trains, continues or evaluates the run that the arguments name."""
    from vit_tucker.run import main

    return main.train(args.cfg, args.overrides, args.evaluate, args.allow_changes, args.dry_run)
