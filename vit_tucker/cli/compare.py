"""``compare``: runs side by side, from their results alone."""

import argparse
from pathlib import Path
from typing import Any

from vit_tucker.cli.common import add_json, emit, to_json


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser("compare", help="compare runs side by side, from their results.json")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--save", type=Path, metavar="FOLDER", help="folder to copy configs, summaries, results and the table to"
    )
    add_json(parser)
    parser.set_defaults(run=compare)


def compare(args: argparse.Namespace) -> int:
    """Prints the table of runs side by side, and writes it to files where asked for."""
    from vit_tucker.report.compare import compared_rows, comparison, save_comparison
    from vit_tucker.storage.paths import refuse_unwritable

    if args.save is not None:
        refuse_unwritable("--save", args.save, folder=True)
    emit(to_json(compared_rows(args.runs)) if args.json else comparison(args.runs))
    if args.save is not None:
        save_comparison(args.runs, args.save)
    return 0
