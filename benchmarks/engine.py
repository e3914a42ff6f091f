"""Images per second of the dense model in our training engine against timm's own train.py.

    python benchmarks/engine.py --timm-train FILE --save benchmarks/results/engine [--device cuda --model vit_base_patch16_224]

timm's script is not in its wheel: take train.py from github.com/huggingface/pytorch-image-models at the tag of the installed
version (pip show timm). Same model, images, recipe, loader processes, threads and machine on both sides. Both are whole commands,
one at a time and in turns (ours, timm, ours, timm, ...), for one epoch. Measured is the time between a log point near the start
of the epoch and its last one, by the wall clock at which they came out; start-up, the steps before the first of them, evaluation
and saving are outside. images/s = images of the steps between / that time. The ratio is ours / timm of the same turn: above 1,
ours is faster.

Cases: jpeg224 and png28 read the same image folder on both sides. In memory28 timm reads the folder of png28, and ours has the
same images as Fashion-MNIST files, which it holds in memory. Exit status: 0 measured, 1 a command failed, 2 bad arguments.
"""

import argparse
import csv
import shlex
import statistics
import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from engine_data import CASES, Case, write_images
from engine_sides import ROOT, commands, our_points, run, timm_points

from vit_tucker.analysis.latency import describe_device
from vit_tucker.errors import ConfigError, nearest
from vit_tucker.storage.paths import refuse_unwritable

SIDES = ("ours", "timm")
COLUMNS = ("case", "side", "turn", "model", "train_samples_per_sec", "train_step_time", "train_batch_size", "train_img_size",
           "param_count", "data_wait_share", "ratio")  # fmt: skip


def measure(case: Case, side: str, args: argparse.Namespace, data: Path, out: Path) -> dict[str, Any]:
    """One run of one side: columns of its row."""
    lines = run(commands(case, args, data, out)[side], args.threads)
    points, params, wait = our_points(out, case.interval) if side == "ours" else timm_points(lines)
    first, last = case.interval, case.steps - 1
    if first not in points or last not in points:
        raise RuntimeError(f"{side}: no log points at steps {first} and {last}, only at {sorted(points)}")
    seconds = (points[last] - points[first]) / (last - first)
    return {
        "side": side,
        "model": args.model,
        "train_samples_per_sec": round(case.batch_size / seconds, 2),
        "train_step_time": round(1000 * seconds, 3),
        "train_batch_size": case.batch_size,
        "train_img_size": case.input_size[-1],
        "param_count": round(params, 4),
        "data_wait_share": None if wait is None else round(wait, 4),
    }


def measure_case(name: str, case: Case, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of all turns of a case, printed as they come; ours have the turn's ratio."""
    rows = []
    write_images(case, folder / "data")
    for turn in range(args.turns):
        pair = {}
        for side in SIDES:
            measured = measure(case, side, args, folder / "data", folder / f"{side}-{turn}")
            pair[side] = {"case": name, "turn": turn, **measured}
            print(name, side, turn, f"{pair[side]['train_samples_per_sec']:.1f} images/s", flush=True)
        ours, theirs = (pair[side] for side in SIDES)
        if ours["param_count"] != theirs["param_count"]:
            raise RuntimeError(
                f"{name}: not the same model: {ours['param_count']} and {theirs['param_count']} M parameters"
            )
        ours["ratio"] = round(ours["train_samples_per_sec"] / theirs["train_samples_per_sec"], 4)
        rows += [ours, theirs]
    return rows


def show_commands(name: str, case: Case, args: argparse.Namespace, folder: Path) -> str:
    """Both commands of a case and our config file, without the paths of this machine."""
    out = folder / "run"
    both = commands(case, args, folder / "data", out)
    lines = [f"# {name}", *(shlex.join(both[side]) for side in SIDES), "", out.with_suffix(".yaml").read_text()]
    text = "\n".join(lines)
    for place, short in ((args.timm_train, "train.py"), (folder, "WORK"), (ROOT, "."), (sys.executable, "python")):
        text = text.replace(str(place), short)
    return text


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Markdown: means over turns, ratio with its spread, how it was measured."""
    lines = [
        "| case | model | parameters (M) | batch | ours, images/s | timm, images/s | ratio | spread (std) | smallest - largest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == name]
        model = f"{args.model} at {mine[0]['train_img_size']}"
        speeds = [statistics.mean(r["train_samples_per_sec"] for r in mine if r["side"] == side) for side in SIDES]
        ratios = [row["ratio"] for row in mine if "ratio" in row]
        spread = f"{statistics.stdev(ratios):.3f}" if len(ratios) > 1 else ""
        lines.append(
            f"| {name} | {model} | {mine[0]['param_count']:.2f} | {mine[0]['train_batch_size']} "
            f"| {speeds[0]:.1f} | {speeds[1]:.1f} | **{statistics.mean(ratios):.3f}** | {spread} "
            f"| {min(ratios):.3f} - {max(ratios):.3f} |"
        )
    precision = "float32" if args.device == "cpu" else "bf16 autocast"
    return "\n".join(
        [
            *lines,
            "",
            f"Ratio: ours / timm in the same turn, {args.turns} turns, from the first log point to the last of one epoch.",
            f"{describe_device(torch.device(args.device))}, {args.threads} thread(s), {args.workers} loader worker(s), "
            f"{precision}; torch {torch.__version__}, timm {timm.__version__}; {date.today()}.",
            "",
        ]
    )


def chosen_case(name: str, args: argparse.Namespace) -> Case:
    """A case with the numbers of the command line."""
    given = {key: getattr(args, key) for key in ("batch_size", "steps", "interval")}
    return replace(CASES[name], **{key: value for key, value in given.items() if value is not None})


def checked_arguments() -> argparse.Namespace:
    """The command line.

    Raises:
        ConfigError: an argument that can't be.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm-train", type=Path, metavar="FILE", help="timm's train.py (needed; see above)")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="where engine.csv, engine.md and commands.txt go")
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="CASE", help=" ".join(CASES))
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="timm model name")
    for name, text in (
        ("batch-size", "images per step"),
        ("steps", "of the epoch"),
        ("interval", "steps between log points"),
    ):
        parser.add_argument(f"--{name}", type=int, help=f"{text}; each case's own if left out")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="loader processes")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (one GPU, bf16 on both sides)")
    args = parser.parse_args()
    if args.timm_train is None or not args.timm_train.is_file():
        given = "is needed" if args.timm_train is None else f"{args.timm_train} is not a file"
        raise ConfigError(f"--timm-train: {given}; get train.py from timm's repository at tag v{timm.__version__}")
    for name in args.cases:
        if name not in CASES:
            raise ConfigError(f"--cases: unknown case '{name}', known: {', '.join(CASES)}{nearest(name, CASES)}")
    if args.device not in ("cpu", "cuda"):
        raise ConfigError(f"--device: {args.device}, known: cpu, cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: cuda, but torch sees no GPU")
    for name, least in (("batch_size", 2), ("interval", 1), ("turns", 1), ("workers", 0), ("threads", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')}: {getattr(args, name)}, at least {least}")
    for case in (chosen_case(name, args) for name in args.cases):
        if case.steps < 2 * case.interval + 1 or (case.steps - 1) % case.interval:
            raise ConfigError(
                f"--steps: {case.steps}, must be a multiple of --interval={case.interval} (two at least) plus 1"
            )
    if args.save is not None:
        refuse_unwritable("--save", args.save, folder=True)
    return args


def main() -> int:
    """See the module."""
    try:
        args = checked_arguments()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    shown = ""
    with tempfile.TemporaryDirectory(prefix="engine-") as work:
        try:
            for name in args.cases:
                folder, case = Path(work) / name, chosen_case(name, args)
                folder.mkdir()
                rows += measure_case(name, case, args, folder)
                shown += show_commands(name, case, args, folder)
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(table(rows, args))
    if args.save is not None:
        args.save.mkdir(parents=True, exist_ok=True)
        with (args.save / "engine.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        (args.save / "engine.md").write_text(table(rows, args))
        (args.save / "commands.txt").write_text(shown)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
