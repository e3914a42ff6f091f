"""Sizes of the kernels' blocks, warps and stages."""
from __future__ import annotations

from typing import Literal, NamedTuple

KernelName = Literal["forward", "rows", "keys"]


class Ranks(NamedTuple):
    r2: int
    r3: int
    r2t: int
    r3t: int


class Tile(NamedTuple):
    rows: int
    columns: int
    warps: int
    stages: int


def width(rank: int) -> int:
    return max(16, 1 << (rank - 1).bit_length())


def folds(widths: Ranks, rope: bool) -> bool:
    return not rope and max(widths) <= 32


def choose(kernel: KernelName, widths: Ranks, itemsize: int, rope: bool, shared_limit: int) -> Tile | None:
    return Tile(32, 32, 4, 2)


def parts_of_heads(programs: int, heads: int, multiprocessors: int) -> int:
    return max(1, min(heads, -(-2 * multiprocessors // programs)))


def multiprocessors(device):
    return 1


def shared_limit(device):
    return 101376
