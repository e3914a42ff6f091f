"""``tables`` and ``report``: tables and figures of finished runs, and the report over kept studies."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_tucker.cli.common import Parser, add_json, emit, to_json
from vit_tucker.run.status import guarded

TABLES = (
    "Tables (Markdown, CSV, LaTeX) and figures (PNG, PDF) of finished runs, and results.jsonl, which keeps their results: "
    "'tables FOLDER' makes everything in FOLDER anew from it."
)
REPORT = (
    "README.md over the studies that 'tables --out' kept in a folder: settings, figures, what holds of the paper's claim; and "
    "one picture of those that compare methods, accuracy_params_light.svg and _dark.svg."
)


def add_parser(commands: Any) -> None:
    """Adds both commands to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser("tables", help="tables and figures of finished runs", description=TABLES)
    add_tables(parser)
    parser.set_defaults(run=tables)
    parser = commands.add_parser(
        "report", help="what came out of kept studies, and what holds of the paper's claim", description=REPORT
    )
    add_report(parser)
    parser.set_defaults(run=report)


def add_tables(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``tables``."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUNS",
        help="run folders, results.json, folders of runs, results.jsonl",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to; the folder itself if one is given")
    parser.add_argument(
        "--x",
        nargs="+",
        default=(),
        metavar="KEY",
        help="also accuracy against these keys of the config, each by itself among settings that agree in all others, e.g. "
        "train.lr; keys that vary together are joined by a comma: attention.ranks.1,attention.ranks.2",
    )
    parser.add_argument(
        "--curves",
        nargs="+",
        default=(),
        metavar="CONFIG",
        help="draw the training curves of these only, e.g. 'tucker-*'",
    )
    add_json(parser)


def add_report(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``report``."""
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("experiments/results"),
        metavar="FOLDER",
        help="experiments/results if left out",
    )


def tables_main(argv: Sequence[str] | None = None) -> int:
    """Runs ``tables`` as ``experiments/tables.py`` does; returns the exit status."""
    parser = Parser(prog="tables.py", description=TABLES)
    add_tables(parser)
    args = parser.parse_args(argv)
    return guarded(lambda: tables(args))


def report_main(argv: Sequence[str] | None = None) -> int:
    """Runs ``report`` as ``experiments/report.py`` does; returns the exit status."""
    parser = Parser(prog="report.py", description=REPORT)
    add_report(parser)
    args = parser.parse_args(argv)
    return guarded(lambda: report(args))


def tables(args: argparse.Namespace) -> int:
    """Writes the tables and figures, and prints where they are."""
    from vit_tucker.errors import ConfigError
    from vit_tucker.report.study import write_study
    from vit_tucker.storage.paths import refuse_unwritable

    if missing := [path for path in args.runs if not path.exists()]:
        raise ConfigError(f"{missing[0]}: no such file or folder")
    out = args.out or (args.runs[0] if len(args.runs) == 1 and args.runs[0].is_dir() else None)
    if out is None:
        raise ConfigError("--out: name a folder for the tables of several runs")
    refuse_unwritable("--out", out, folder=True)
    study = write_study(args.runs, out, args.x, args.curves, quiet=args.json)
    parts = [(output.section.title, len(output.section.runs), len(output.section.settings)) for output in study.outputs]
    if args.json:
        sections = [dict(zip(("title", "runs", "settings"), part, strict=True)) for part in parts]
        emit(to_json({"tables": out / "tables.md", "sections": sections, "notes": study.notes}))
        return 0
    for title, runs, settings in parts:
        print(f"{title}: {runs} runs of {settings} settings")
    print(*study.notes, f"tables in {out / 'tables.md'}", sep="\n")
    return 0


def report(args: argparse.Namespace) -> int:
    """Writes the report and prints where it is."""
    from vit_tucker.report.report import write_report
    from vit_tucker.storage.paths import refuse_unwritable

    refuse_unwritable("FOLDER", args.folder, folder=True)
    print(write_report(args.folder))
    return 0
