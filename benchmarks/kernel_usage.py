"""Compiles the kernels for a GPU that need not be there, and reads what they use of it.

Needs Triton 3.3 or later, not as its interpreter. Registers, spills and instructions come from the tools that Triton brings.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vit_tucker.attention.triton_tucker.backward_keys import keys_kernel
from vit_tucker.attention.triton_tucker.backward_rows import rows_kernel
from vit_tucker.attention.triton_tucker.forward import forward_kernel
from vit_tucker.attention.triton_tucker.tiles import KernelName, Ranks, Tile, rank_constants

JITTED = {"forward": forward_kernel, "rows": rows_kernel, "keys": keys_kernel}
FLOATS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
MASKS = ("none", "boolean", "additive", "causal")
SIZES = ("B", "N", "H", "splits")
UNIT_STRIDES = ("p_column", "k_column", "v_column", "dz_column", "mask_column")
"""Strides that are 1 for the tensors a layer hands over: Triton makes those constants."""


class Usage(NamedTuple):
    """Of one compiled kernel.

    Attributes:
        shared: bytes of shared memory per block.
        registers: per thread.
        spilled: bytes per thread in the stack frame, which holds nothing but spilled registers here.
        tensor_core: instructions in the PTX that use tensor cores.
    """

    shared: int
    registers: int
    spilled: int
    tensor_core: int


def compile_kernel(
    kernel: KernelName,
    ranks: Ranks,
    tile: Tile,
    capability: int,
    dtype: str = "bf16",
    mask: str = "none",
    rope: bool = False,
) -> Usage:
    """Compile a kernel.

    Args:
        kernel: its name.
        ranks: r2, r3, r2t, r3t.
        tile: sizes of the blocks.
        capability: 80, 86, 90.
        dtype: one of ``FLOATS``.
        mask: one of ``MASKS``.
        rope: whether queries are rotated.
    """
    function = JITTED[kernel]
    constants = _constants(ranks, tile, dtype, mask, rope) | dict.fromkeys(UNIT_STRIDES, 1)
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {n: "constexpr" if n in constants else _type(n, dtype, mask) for n in function.arg_names}
    aligned: dict[tuple[int, ...], Any] = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if name not in constants and name not in (*SIZES, "scale") and not name.startswith("mask_")
    }
    built = triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    registers, spilled = _resources(built.asm["cubin"])
    tensor_core = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)\b", built.asm["ptx"]))
    return Usage(built.metadata.shared, registers, spilled, tensor_core)


def _constants(ranks: Ranks, tile: Tile, dtype: str, mask: str, rope: bool) -> dict[str, Any]:
    """Returns compile-time constants, as ``launch`` gives them."""
    return {
        **rank_constants(ranks),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "MASK": MASKS.index(mask),
        "ROPE": rope,
        "LOW": FLOATS[dtype],
        "EMULATE": False,
    }


def _type(name: str, dtype: str, mask: str) -> str:
    """Type of an argument that is no constant, in Triton's notation."""
    if name == "scale":
        return "fp32"
    if name in SIZES or name.endswith(("_image", "_head", "_row")):
        return "i32"
    if name in ("lse", "delta", "sin", "cos"):
        return "*fp32"
    return "*u8" if name == "mask" and mask == "boolean" else f"*{dtype}"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text[:200]}")
    return int(found[1]), int(found[2])
