"""``python -m vit_tucker`` and the installed ``vit-tucker``: all commands under one parser."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vit_tucker.cli import (
    bench,
    compare,
    completion,
    convert,
    cost,
    evaluate,
    explain,
    export,
    hosts,
    info,
    lists,
    perplexity,
    plan,
    predict,
    push,
    ranks,
    sweep,
    tables,
    tokenize,
    train,
)
from vit_tucker.cli.common import Parser, add_plugins, parse_with_overrides, run_command
from vit_tucker.run.status import guarded
from vit_tucker.version import __version__

COMMANDS = (
    *(plan, convert, train, sweep, evaluate, perplexity, predict, explain, export, push),
    *(tokenize, compare, tables, ranks, hosts, cost, bench, lists, info, completion),
)
"""Each adds its commands, in the order of the help."""
WITHOUT_PLUGINS = ("tokenize", "compare", "tables", "report", "configs", "info", "completion")
"""Commands that open no config and no model: they read text or results, or nothing."""


def build_parser(prog: str = "vit-tucker") -> argparse.ArgumentParser:
    """Returns the parser of all commands; each sets ``run``, a function of the arguments that returns an exit status."""
    parser = Parser(
        prog=prog,
        description="Attention methods for timm's vision transformers: convert, train, compare, deploy.",
        epilog="Exit status: 0 done, 1 failed, 2 bad config or arguments, 130 interrupted. 'COMMAND --help' lists options.",
    )
    parser.add_argument("--version", action="version", version=f"vit_tucker {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    for name, command_parser in commands.choices.items():
        if name not in WITHOUT_PLUGINS:
            add_plugins(command_parser)
    commands.choices["completion"].set_defaults(build=build_parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    as_module = Path(sys.argv[0]).parts[-2:] == ("vit_tucker", "__main__.py")
    parser = build_parser("python -m vit_tucker") if as_module else build_parser()
    try:
        args = parse_with_overrides(parser, argv)
    except SystemExit as stop:  # argparse has said why, or shown its help
        return int(stop.code or 0)
    return guarded(lambda: args.run(args) if args.command in WITHOUT_PLUGINS else run_command(args, args.run))
