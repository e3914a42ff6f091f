"""Seconds of whole commands, of this checkout against another one, in turns.

    git worktree add ../before COMMIT
    python benchmarks/startup.py ../before [--turns 3] [--save benchmarks/results/startup]

Both run in this Python, on the two runs of ``./run.sh`` in this checkout's ``runs/``. Measure on a quiet machine.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from vit_tucker.show.tables import csv_text, markdown

ROOT = Path(__file__).resolve().parents[1]
RUNS = [str(ROOT / "runs" / name) for name in ("digits-dense-0", "digits-tucker_r16_finetune-0")]
COMMANDS = {
    "help": ["--help"],
    "configs": ["configs"],
    "compare two runs": ["compare", *RUNS],
    "train, a wrong key": ["train", "--cfg", "digits/dense", "train.epochz=1"],
    "sweep, a wrong key": ["sweep", "--cfg", "sweeps/fig3_digits", "finetune.train.epochz=1"],
    "train --dry-run": ["train", "--cfg", "digits/tucker_r16", "--dry-run"],
    "sweep --dry-run": ["sweep", "--cfg", "sweeps/fig3_digits", "--dry-run"],
    "plan": ["plan", "--cfg", "digits/tucker_r16"],
    "cost of a ViT-B/16": ["cost", "vit_base_patch16_224", "--method", "gqa num_kv_heads=1"],
    "evaluate a run": ["evaluate", RUNS[1]],
    "plan, no network": ["plan", "vit_tiny_patch16_224", "--method", "gqa num_kv_heads=1", "model.pretrained=true"],
}
IMPORTS = (
    "import torch",
    "import sklearn.model_selection",
    "import timm",
    "import vit_tucker; vit_tucker.patch; import timm",
)
"""Statements whose seconds most of these commands consist of."""
COLUMNS = ("command", "arguments", "before_seconds", "after_seconds", "before_status", "after_status")


def timed(checkout: Path, arguments: list[str], folder: str) -> tuple[float, int]:
    """Runs Python on a checkout in an empty folder, and returns its seconds and its exit status."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HOME": str(Path(folder) / "hub")}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True)
    return time.perf_counter() - start, done.returncode


def main() -> int:
    """Measures all commands, prints their table and saves it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="where startup.csv and startup.md go")
    args = parser.parse_args()
    rows = []
    timed_commands = {name: ["-m", "vit_tucker", *arguments] for name, arguments in COMMANDS.items()}
    for name, arguments in (timed_commands | {code: ["-c", code] for code in IMPORTS}).items():
        seconds: dict[Path, list[float]] = {args.before.resolve(): [], ROOT: []}
        status = {}
        for _ in range(args.turns):
            for checkout, own in seconds.items():
                with tempfile.TemporaryDirectory() as folder:
                    taken, status[checkout] = timed(checkout, arguments, folder)
                own.append(taken)
        medians = [f"{statistics.median(own):.2f}" for own in seconds.values()]
        shown = shlex.join(arguments).replace(f"{ROOT}/", "")
        rows.append((name, shown, *medians, *map(str, status.values())))
        print(*rows[-1], flush=True)
    commits = [
        subprocess.check_output(["git", "-C", str(at), "rev-parse", "--short", "HEAD"], text=True).strip()
        for at in seconds
    ]
    table = markdown(("command", "before, s", "after, s"), [(row[0], row[2], row[3]) for row in rows])
    where = f"before: commit {commits[0]}, after: {commits[1]}; {os.cpu_count()} cores; {date.today()}"
    text = f"{table}\n\nMedians of {args.turns} turns; {where}.\n"
    print(f"\n{text}")
    if args.save is not None:
        args.save.mkdir(parents=True, exist_ok=True)
        (args.save / "startup.md").write_text(text)
        (args.save / "startup.csv").write_text(csv_text(COLUMNS, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
