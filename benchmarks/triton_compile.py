"""What the Triton kernels of Tucker Attention use of a GPU, by the compiler: no GPU needed, and nothing is timed.

    python benchmarks/triton_compile.py                    # all kernels for sm_80, sm_86 and sm_90
    python benchmarks/triton_compile.py --save FOLDER

Shared memory that doesn't fit, or more of it than ``tiles.shared_bytes`` says, ends the script with status 1. Needs Triton 3.3 or
later and TRITON_INTERPRET unset.
"""

import argparse
import csv
import os
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from kernel_usage import ITEMSIZE, compile_kernel

from vit_tucker.attention.triton_tucker import tiles
from vit_tucker.attention.triton_tucker.tiles import KERNELS, KernelName, Ranks

LIMITS = {80: 166912, 86: 101376, 90: 232448}
"""Bytes of shared memory that a block may have (A100; A10G and RTX 30xx; H100)."""
EQUAL = (8, 16, 32, 64, 128)
UNEQUAL = (Ranks(128, 16, 64, 32), Ranks(16, 128, 32, 64), Ranks(33, 24, 12, 100))
VARIANTS: dict[str, tuple[str, bool]] = {
    "plain": ("none", False),
    "boolean mask": ("boolean", False),
    "additive mask": ("additive", False),
    "RoPE": ("none", True),
}


def cases() -> Iterator[tuple[KernelName, str, Ranks, str]]:
    """Kernel, dtype, ranks and variant of each row of the table."""
    for kernel in KERNELS:
        for variant in VARIANTS:
            for ranks in (*(Ranks(r, r, r, r) for r in EQUAL), *UNEQUAL):
                yield kernel, "bf16", ranks, variant
        for rank in (16, 64, 128):
            yield kernel, "fp32", Ranks(rank, rank, rank, rank), "plain"


def row(kernel: KernelName, dtype: str, ranks: Ranks, variant: str, capability: int) -> dict[str, Any]:
    """Compile one kernel with the tile that a device with this capability would get."""
    mask, rope = VARIANTS[variant]
    widths, itemsize, limit = Ranks(*map(tiles.width, ranks)), ITEMSIZE[dtype], LIMITS[capability]
    tile = tiles.choose(kernel, widths, itemsize, rope, mask != "none", limit)
    if tile is None:
        raise SystemExit(f"no tile of {kernel} for {tuple(ranks)} fits {limit} bytes")
    usage = compile_kernel(kernel, ranks, tile, capability, dtype, mask, rope)
    return {
        "kernel": kernel,
        "dtype": dtype,
        "ranks": " ".join(map(str, ranks)),
        "variant": variant,
        "target": f"sm_{capability}",
        "rows x columns": f"{tile.rows}x{tile.columns}",
        "warps": tile.warps,
        "stages": tile.stages,
        "shared": usage.shared,
        "bound": tiles.shared_bytes(kernel, tile, widths, itemsize, mask != "none"),
        "limit": limit,
        "registers": usage.registers,
        "spilled": usage.spilled,
        "tensor-core instructions": usage.tensor_core,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row.values())) + " |" for row in rows])


def main() -> int:
    """Compile, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write usage.csv and usage.md there")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise SystemExit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    rows = [row(*case, capability) for case in cases() for capability in LIMITS]
    note = (
        "ranks: r2 r3 r2t r3t; shared, bound, limit: bytes of shared memory per block as compiled, as `tiles.py` bounds them and "
        "as the device has them; registers per thread; spilled: bytes per thread.\n\n"
        f"{date.today()}, triton {triton.__version__}, torch {torch.__version__}"
    )
    print(table(rows), note, sep="\n\n")
    if args.save is not None:
        args.save.mkdir(parents=True, exist_ok=True)
        with (args.save / "usage.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        (args.save / "usage.md").write_text(f"{table(rows)}\n\n{note}\n")
    wrong = [r for r in rows if not r["shared"] <= r["bound"] <= r["limit"]]
    for r in wrong:
        print(f"too much shared memory: {r}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
