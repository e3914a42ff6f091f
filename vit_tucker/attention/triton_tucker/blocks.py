"""Provides what the kernels have in common: loads, rounding, rotation and masking of one block.

The interpreter multiplies the bit patterns of bfloat16 numbers and truncates them when it converts. With EMULATE (bfloat16 in the
interpreter only) operands are therefore float32 numbers rounded to bfloat16's grid.
"""

from typing import Any

import triton
import triton.language as tl

Block = Any
Address = Any
Scalar = Any

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
BOOLEAN: tl.constexpr = tl.constexpr(1)
ADDITIVE: tl.constexpr = tl.constexpr(2)
CAUSAL: tl.constexpr = tl.constexpr(3)


@triton.jit
def load_block(
    start: "Address",
    first: "Scalar",
    rows: "Block",
    columns: "Block",
    row_stride: "Scalar",
    column_stride: "Scalar",
    row_end: "Scalar",
    COLUMNS: tl.constexpr,
    EMULATE: tl.constexpr,
) -> Block:
    """Loads a block of a matrix; zeros where it has no entries.

    The block's address has 64 bits, offsets in it 32.

    Args:
        start, row_stride, column_stride: of the matrix.
        first, rows: rows first + ``rows`` are loaded.
        columns: numbers of the columns.
        row_end, COLUMNS: rows and columns of the matrix.
        EMULATE: convert to float32, see the module.
    """
    inside = (first + rows < row_end)[:, None] & (columns < COLUMNS)[None, :]
    corner = start + tl.cast(first, tl.int64) * row_stride
    block = tl.load(corner + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=inside, other=0.0)
    if EMULATE:
        block = block.to(tl.float32)
    return block


@triton.jit
def store_block(
    start: "Address",
    block: "Block",
    first: "Scalar",
    rows: "Block",
    columns: "Block",
    row_stride: "Scalar",
    row_end: "Scalar",
    COLUMNS: tl.constexpr,
    EMULATE: tl.constexpr,
) -> None:
    """Stores rows whose entries are neighbours, rounded to the dtype of the memory: the inverse of ``load_block``.

    Other arguments as of ``load_block``.

    Args:
        block: (rows, columns).
    """
    inside = (first + rows < row_end)[:, None] & (columns < COLUMNS)[None, :]
    corner = start + tl.cast(first, tl.int64) * row_stride
    if EMULATE and start.dtype.element_ty == tl.bfloat16:
        block = rounded(block.to(tl.float32), tl.bfloat16, EMULATE)
    tl.store(corner + rows[:, None] * row_stride + columns[None, :], block.to(start.dtype.element_ty), mask=inside)


@triton.jit
def rounded(block: "Block", LOW: tl.constexpr, EMULATE: tl.constexpr) -> Block:
    """Rounds a block to an operand of a product.

    Args:
        block: float32.
        LOW: dtype of the inputs.
        EMULATE: see the module.
    """
    if EMULATE:  # to nearest, ties to even
        bits = block.to(tl.uint32, bitcast=True)
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        result = bits.to(tl.float32, bitcast=True)
    else:
        result = block.to(LOW)
    return result


@triton.jit
def product(a: "Block", b: "Block") -> Block:
    """Multiplies blocks with float32 sums; float32 operands are not rounded to TF32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def rotate(block: "Block", sin: "Block", cos: "Block") -> Block:
    """Rotates each pair of neighbours (2 p, 2 p + 1) of a block by its angle, see ``rope.rotate``.

    Args:
        block: (M, R).
        sin, cos: (M, R/2).
    """
    first, second = tl.split(tl.reshape(block, (block.shape[0], block.shape[1] // 2, 2)))
    return tl.interleave(first * cos - second * sin, second * cos + first * sin)


@triton.jit
def masked_scores(
    scores: "Block",
    mask: "Address",
    first_row: "Scalar",
    first_column: "Scalar",
    rows: "Block",
    columns: "Block",
    row_stride: "Scalar",
    column_stride: "Scalar",
    N: "Scalar",
    MASK: tl.constexpr,
) -> Block:
    """Returns scores in base 2 with the mask; -inf for columns that are no tokens.

    The block's address is one 64-bit number (N * N can exceed 32 bits), the offsets in it have 32 bits: 64-bit ones for each
    entry
    would fill the registers.

    Args:
        scores: a block.
        mask, row_stride, column_stride: of the image and head.
        first_row, first_column: where the block starts.
        rows, columns: numbers within the block; they broadcast to the scores' shape, so that scores may be transposed.
        N: tokens.
        MASK: kind of the mask.
    """
    inside = first_column + columns < N
    if MASK == CAUSAL:
        inside = inside & (first_column + columns <= first_row + rows)
    elif MASK:
        corner = mask + tl.cast(first_row, tl.int64) * row_stride + tl.cast(first_column, tl.int64) * column_stride
        at = corner + (rows * row_stride + columns * column_stride)
        stored = inside & (first_row + rows < N)
        if MASK == BOOLEAN:
            inside = inside & (tl.load(at, mask=stored, other=0) != 0)
        else:
            scores += tl.load(at, mask=stored, other=0.0).to(tl.float32) * LOG2E
    return tl.where(inside, scores, float("-inf"))
