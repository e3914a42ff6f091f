#!/usr/bin/env python
"""Tables and figures of finished runs, from their results alone.

python experiments/tables.py runs/fig3_digits --out experiments/results/fig3_digits
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vit_tucker.cli import guarded


def main() -> int:
    """Parse, then write the tables."""
    parser = argparse.ArgumentParser(
        prog="tables.py",
        description="Tables (Markdown, CSV, LaTeX) and figures (PNG, PDF) of finished runs, and results.jsonl, which keeps "
        "their results: tables.py FOLDER makes everything in FOLDER anew from it.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, results.json, folders of runs, results.jsonl")
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
    args = parser.parse_args()
    return guarded(lambda: tables(args))


def tables(args: argparse.Namespace) -> int:
    """Write them and say where."""
    from vit_tucker.errors import ConfigError
    from vit_tucker.paths import refuse_unwritable
    from vit_tucker.report.study import write_study

    if missing := [path for path in args.runs if not path.exists()]:
        raise ConfigError(f"{missing[0]}: no such file or folder")
    out = args.out or (args.runs[0] if len(args.runs) == 1 and args.runs[0].is_dir() else None)
    if out is None:
        raise ConfigError("--out: name a folder for the tables of several runs")
    refuse_unwritable("--out", out, folder=True)
    study = write_study(args.runs, out, args.x, args.curves)
    for output in study.outputs:
        print(f"{output.section.title}: {len(output.section.runs)} runs of {len(output.section.settings)} settings")
    print(*study.notes, f"tables in {out / 'tables.md'}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
