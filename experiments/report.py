#!/usr/bin/env python
"""The report over all kept studies: what was run, what came out, what holds of the paper's claim.

python experiments/report.py experiments/results
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vit_tucker.cli import guarded


def main() -> int:
    """Parse, then write the report."""
    parser = argparse.ArgumentParser(
        prog="report.py", description="README.md over the studies that tables.py --out kept in a folder."
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("experiments/results"), help="experiments/results if left out"
    )
    args = parser.parse_args()
    return guarded(lambda: report(args.folder))


def report(folder: Path) -> int:
    """Write it and say where."""
    from vit_tucker.paths import refuse_unwritable
    from vit_tucker.report.report import write_report

    refuse_unwritable("FOLDER", folder, folder=True)
    print(write_report(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
