"""Sizes of the kernels' blocks, warps and stages: a short ordered list, the first whose shared memory fits the device.

The lists come from compiling all kernels for sm_80, sm_86 and sm_90 (``benchmarks/triton_compile.py``): the largest blocks whose
registers don't spill, or hardly, with Triton 3.8; earlier ones spill more. Nobody has timed them.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

KernelName = Literal["forward", "rows", "keys"]
KERNELS: tuple[KernelName, ...] = ("forward", "rows", "keys")
WITHOUT_DEVICE = 101376
"""Bytes of shared memory assumed for the interpreter: those of sm_86, the least of all supported GPUs."""
PROGRAMS_PER_MULTIPROCESSOR = 2


class Ranks(NamedTuple):
    """Ranks of P, K and T_i, and of Z, V and S_i; or the widths of the blocks that hold them."""

    r2: int
    r3: int
    r2t: int
    r3t: int


class Tile(NamedTuple):
    """Rows are queries, columns are keys."""

    rows: int
    columns: int
    warps: int
    stages: int


class TileChoice(NamedTuple):
    """A tile and what it is for: ranks up to a width, the bytes of a number, and whether for masks and rotations too."""

    width: int
    itemsize: int
    heavy: bool
    tile: Tile


# A mask in memory or a rotation costs registers, so the blocks are narrower. Products of float32 numbers are sums in registers of
# plain threads: small blocks, many warps. Behind the first choice of a width comes what a device with less shared memory gets.
CHOICES: dict[KernelName, tuple[TileChoice, ...]] = {
    "forward": (
        TileChoice(32, 2, False, Tile(64, 64, 4, 3)),
        TileChoice(32, 2, True, Tile(64, 32, 4, 3)),
        TileChoice(64, 2, False, Tile(64, 64, 4, 3)),
        TileChoice(64, 2, True, Tile(64, 32, 4, 3)),
        TileChoice(128, 2, False, Tile(64, 64, 8, 2)),
        TileChoice(128, 2, True, Tile(64, 32, 8, 2)),
        TileChoice(128, 2, True, Tile(32, 32, 4, 1)),
        TileChoice(32, 4, True, Tile(32, 32, 4, 1)),
        TileChoice(64, 4, True, Tile(32, 32, 8, 1)),
        TileChoice(128, 4, True, Tile(32, 32, 8, 1)),
        TileChoice(128, 4, True, Tile(16, 16, 8, 1)),
    ),
    "rows": (
        TileChoice(32, 2, False, Tile(64, 64, 4, 3)),
        TileChoice(32, 2, True, Tile(64, 32, 4, 3)),
        TileChoice(64, 2, False, Tile(64, 64, 4, 2)),
        TileChoice(64, 2, True, Tile(64, 32, 4, 2)),
        TileChoice(128, 2, False, Tile(64, 64, 8, 2)),
        TileChoice(128, 2, True, Tile(64, 32, 8, 2)),
        TileChoice(128, 2, True, Tile(32, 32, 4, 1)),
        TileChoice(32, 4, True, Tile(32, 32, 8, 1)),
        TileChoice(64, 4, True, Tile(32, 32, 8, 1)),
        TileChoice(128, 4, True, Tile(32, 32, 8, 1)),
        TileChoice(128, 4, True, Tile(16, 16, 8, 1)),
    ),
    "keys": (
        TileChoice(32, 2, False, Tile(64, 64, 4, 2)),
        TileChoice(64, 2, True, Tile(32, 64, 4, 2)),
        TileChoice(128, 2, True, Tile(32, 64, 8, 2)),
        TileChoice(128, 2, True, Tile(32, 32, 4, 1)),
        TileChoice(64, 4, True, Tile(32, 32, 8, 1)),
        TileChoice(128, 4, True, Tile(32, 32, 8, 1)),
        TileChoice(128, 4, True, Tile(16, 16, 8, 1)),
    ),
}


def width(rank: int) -> int:
    """Returns the width of the block that holds a rank: the next power of two, at least 16 as tensor cores want it."""
    return max(16, 1 << (rank - 1).bit_length())


def rank_constants(ranks: Ranks) -> dict[str, int]:
    """Returns the kernels' compile-time constants for these ranks: R2 and WIDTH2, ..., R3T and WIDTH3T."""
    names = ("2", "3", "2T", "3T")
    return {f"R{name}": rank for name, rank in zip(names, ranks, strict=True)} | {
        f"WIDTH{name}": width(rank) for name, rank in zip(names, ranks, strict=True)
    }


def choose(kernel: KernelName, ranks: Ranks, itemsize: int, rope: bool, mask: bool, shared_memory: int) -> Tile | None:
    """Returns the first tile of the list that is meant for the case and fits, or None.

    Args:
        kernel: one of ``KERNELS``.
        ranks: r2, r3, r2t, r3t; or the widths of the blocks that hold them.
        itemsize: bytes of a number, 2 or 4.
        rope: whether queries are rotated.
        mask: whether there is a mask in memory.
        shared_memory: bytes that a block of the device may have.
    """
    of_keys = kernel == "keys"  # queries come to it formed and rotated
    heavy = mask or (rope and not of_keys)
    widths = Ranks(*map(width, ranks))
    widest = max(widths.r3, widths.r3t) if of_keys else max(widths)
    for choice in CHOICES[kernel]:
        meant = widest <= choice.width and itemsize == choice.itemsize and (choice.heavy or not heavy)
        if meant and shared_bytes(kernel, choice.tile, widths, itemsize, mask) <= shared_memory:
            return choice.tile
    return None


def shared_bytes(kernel: KernelName, tile: Tile, widths: Ranks, itemsize: int, mask: bool) -> int:
    """Returns a bound on the bytes of shared memory that the compiler uses for a tile and blocks of these widths, see ``choose``.

    Counted is what may lie there at once, by what the compiler does on all targets: operands that outlive the inner loop, the
    blocks that the loop has in flight (one per stage but the last, for the kernel over keys one per stage), twice a block of
    scores on its way between layouts, a block of the mask in 32 bits, and the cores.

    Args:
        kernel: one of ``KERNELS``.
        tile: rows, columns and stages.
        widths: of the blocks that hold r2, r3, r2t, r3t.
        itemsize: bytes of a number, 2 or 4.
        mask: whether there is a mask in memory.
    """
    r2, r3, r2t, r3t = widths
    scores = tile.rows * tile.columns * (2 * itemsize + (4 if mask else 0))
    if kernel == "keys":
        flying = tile.rows * ((r3 + r3t) * itemsize + 2 * 4)  # with log-sum-exp and delta
        return tile.columns * (r3 + r3t) * itemsize + tile.stages * flying + scores
    flying = max(1, tile.stages - 1) * tile.columns * (r3 + r3t) * itemsize + scores
    kept = tile.rows * ((r2 if kernel == "forward" else max(r2t, r3t)) + max(r3, r3t)) * itemsize
    return kept + max(max(r2 * r3, r2t * r3t) * itemsize, flying)


def parts_of_heads(programs: int, heads: int, multiprocessors: int) -> int:
    """Returns the number of parts into which the heads are split, so that a grid fills the device.

    Args:
        programs: of the grid without parts.
        heads: H, the most parts.
        multiprocessors: of the device.
    """
    return max(1, min(heads, -(-PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // max(programs, 1))))


def multiprocessors(device: torch.device) -> int:
    """Returns the number of multiprocessors of a GPU; 1 without one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def shared_memory(device: torch.device) -> int:
    """Returns the bytes of shared memory that a block may have."""
    if device.type != "cuda":
        return WITHOUT_DEVICE
    known: Any = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
    if known is None:
        from triton.runtime import driver

        known = driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
    return int(known)
