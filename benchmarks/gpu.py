"""Everything that only a GPU can say, in one call: do the kernels compute what they should, and how fast and small are they?

    python benchmarks/gpu.py --save benchmarks/results/gpu_h100 [--minutes 9]

Runs, one after the other, each a command of its own that may fail without stopping the others: the tests of the Triton kernels on
the device; ``attention.py`` over tokens, ranks and widths of ViT-S, B and L in bfloat16, on sdpa, triton, flash_attn and flex
where they are there, against timm's dense layer; ``model.py`` for ViT-B/16 and ViT-L/16 by itself and compiled. ``gpu.md`` there
says what ran, how long, and what failed. What no longer fits the minutes is left out, and said.

``--rehearse`` runs the same commands at toy sizes on the CPU, the kernels through Triton's interpreter: to see that they work.
Exit status: 0 all ran, 1 something failed or was left out, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

from vit_tucker.analysis.latency import describe_device
from vit_tucker.errors import VitTuckerError
from vit_tucker.storage.paths import refuse_unwritable

HERE = Path(__file__).resolve().parent
TOKENS = (197, 577, 1024, 4096)
WIDTHS = ((384, 6), (768, 12), (1024, 16))
TOKENS_PER_BATCH = 64 * 197
BACKENDS = ("sdpa", "triton", "flash_attn", "flex")


class Part(NamedTuple):
    """A command and where its results go."""

    name: str
    command: list[str]


def parts(folder: Path, rehearse: bool) -> list[Part]:
    """The commands, the most important first."""
    python, device = sys.executable, "cpu" if rehearse else "cuda"
    tests = ["tests/attention/test_triton_tucker.py", "tests/attention/backends/test_tucker_triton.py"]
    found = [Part("kernels", [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests])]
    common = ["--device", device, "--precision", "bf16"]
    quick = ["--turns", "2", "--seconds", "0.001"] if rehearse else ["--turns", "7", "--seconds", "0.05"]
    for dim, heads in ((48, 3),) if rehearse else WIDTHS:
        shapes = [f"{max(1, TOKENS_PER_BATCH // n)}x{n}x{dim}x{heads}" for n in TOKENS]
        shapes, ranks = (["2x17x48x3"], ["8", "16"]) if rehearse else (shapes, ["16", "32", "64", "128"])
        command = [
            python,
            str(HERE / "attention.py"),
            *common,
            *quick,
            "--no-peers",
            "--shapes",
            *shapes,
            "--ranks",
            *ranks,
        ]
        backends = ["sdpa", "triton"] if rehearse else list(BACKENDS)
        found.append(Part(f"width_{dim}", [*command, "--backends", *backends, "--save", str(folder / f"width_{dim}")]))
    models = ["test_vit"] if rehearse else ["vit_base_patch16_224", "vit_large_patch16_224"]
    size = ["--batch-size", "1" if rehearse else "128", "--ranks", "16", *([] if rehearse else ["32", "64"])]
    for backend in ("sdpa", "triton"):
        for compiled in ([],) if rehearse else ([], ["--compile"]):
            name = f"models_{backend}{'_compiled' if compiled else ''}"
            command = [python, str(HERE / "model.py"), *common, *quick, *size, *compiled, "--models", *models]
            found.append(Part(name, [*command, "--backend", backend, "--save", str(folder / name)]))
    return found


def run(part: Part, seconds: float, rehearse: bool) -> tuple[str, float]:
    """Run a command; what became of it, and the seconds it took."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    if rehearse:
        environment |= {"TRITON_INTERPRET": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(part.command, cwd=HERE.parent, env=environment, timeout=seconds, check=False)
        outcome = "done" if done.returncode == 0 else f"failed with exit status {done.returncode}"
    except subprocess.TimeoutExpired:
        outcome = "stopped: out of time"
    return outcome, time.monotonic() - start


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU")
    args = parser.parse_args()
    try:
        refuse_unwritable("--save", args.save, folder=True)
    except VitTuckerError as error:
        parser.error(str(error))
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("no CUDA device here; --rehearse runs the same at toy sizes on the CPU")
    args.save.mkdir(parents=True, exist_ok=True)
    folder, end = args.save.resolve(), time.monotonic() + 60 * args.minutes
    device = "CPU, Triton's interpreter" if args.rehearse else describe_device(torch.device("cuda"))
    lines = [f"{date.today()}, {device}, torch {torch.__version__}, CUDA {torch.version.cuda}", ""]
    good = True
    for part in parts(folder, args.rehearse):
        left = end - time.monotonic()
        outcome, seconds = run(part, left, args.rehearse) if left > 0 else ("left out: no time", 0.0)
        good = good and outcome == "done"
        command = ["python", *part.command[1:]]
        shown = " ".join(command).replace(str(folder), args.save.name).replace(str(HERE.parent) + os.sep, "")
        lines.append(f"- {part.name}: {outcome}, {seconds:.0f} s: `{shown}`")
        print(lines[-1], flush=True)
        (folder / "gpu.md").write_text("\n".join(lines) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
