"""The forward kernel: queries, online softmax and output of all heads in one program per block of rows.

For each head i of the program, with T_i and S_i the slices of the two tensors (arXiv 2603.30033, Eqs 2-6):

    Q_i = P T_i;  Y_i = softmax(scale Q_i K^T + mask) V;  Z += Y_i S_i^T

Neither Q_i (B, H, N, r3) nor Y_i (B, H, N, r3t) reach memory; the log-sum-exp of each row does, for the backward pass. Scores are
kept in base 2: the scale of the queries holds a factor log2(e), so that exp2 needs no product of its own.
"""

import triton
import triton.language as tl

from vit_tucker.attention.triton_tucker.blocks import (
    CAUSAL,
    LOG2E,
    Address,
    Scalar,
    load_block,
    masked_scores,
    product,
    rotate,
    rounded,
    store_block,
)


@triton.jit(do_not_specialize=["B", "N", "H", "splits"])
def forward_kernel(
    p: "Address",
    k: "Address",
    v: "Address",
    pre: "Address",
    post: "Address",
    sin: "Address",
    cos: "Address",
    mask: "Address",
    z: "Address",
    lse: "Address",
    scale: "Scalar",
    B: "Scalar",
    N: "Scalar",
    H: "Scalar",
    splits: "Scalar",
    p_image: "Scalar",
    p_row: "Scalar",
    p_column: "Scalar",
    k_image: "Scalar",
    k_row: "Scalar",
    k_column: "Scalar",
    v_image: "Scalar",
    v_row: "Scalar",
    v_column: "Scalar",
    angle_image: "Scalar",
    mask_image: "Scalar",
    mask_head: "Scalar",
    mask_row: "Scalar",
    mask_column: "Scalar",
    R2: tl.constexpr,
    R3: tl.constexpr,
    R2T: tl.constexpr,
    R3T: tl.constexpr,
    WIDTH2: tl.constexpr,
    WIDTH3: tl.constexpr,
    WIDTH2T: tl.constexpr,
    WIDTH3T: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASK: tl.constexpr,
    ROPE: tl.constexpr,
    LOW: tl.constexpr,
    EMULATE: tl.constexpr,
) -> None:
    """Computes one block of ROWS rows of one image, for one part of the heads.

    Program numbers run over row blocks, then parts of the heads, then images. No size makes a kernel of its own: another batch or
    image size needs no compilation.

    Args:
        p, k, v: (B, N, r2), (B, N, r3), (B, N, r3t).
        pre, post: (H, r2, r3), (H, r2t, r3t), contiguous.
        sin, cos, angle_image: (N, r3/2) per image, and the stride of the images.
        mask: (B, H, N, N), see MASK.
        z: (splits, B, N, r2t), written.
        lse: (B, H, N) in base 2, written; +inf marks a row in which everything is masked, whose Y is zero.
        scale: factor on the scores.
        B, N, H, splits: images, tokens, heads and parts of the heads.
        p_image, p_row, p_column, k_image, k_row, k_column, v_image, v_row, v_column: strides.
        mask_image, mask_head, mask_row, mask_column: strides.
        R2, R3, R2T, R3T, WIDTH2, WIDTH3, WIDTH2T, WIDTH3T: ranks, and ranks rounded up to powers of two.
        ROWS, COLUMNS: tile of the scores.
        MASK, ROPE: kind of the mask, and whether queries are rotated.
        LOW, EMULATE: dtype of the inputs, see ``rounded``.
    """
    row_blocks = tl.cdiv(N, ROWS)
    number = tl.program_id(0)
    block = number % row_blocks
    part = (number // row_blocks) % splits
    image = (number // row_blocks // splits).to(tl.int64)
    first_head = part * H // splits
    end_head = (part + 1) * H // splits

    m, n = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    rows = block * ROWS + m
    c2, c3 = tl.arange(0, WIDTH2), tl.arange(0, WIDTH3)
    c2t, c3t = tl.arange(0, WIDTH2T), tl.arange(0, WIDTH3T)
    k += image * k_image
    v += image * v_image
    tokens = load_block(p + image * p_image, block * ROWS, m, c2, p_row, p_column, N, R2, EMULATE)
    if ROPE:
        half = tl.arange(0, WIDTH3 // 2)
        sines = load_block(sin + image * angle_image, block * ROWS, m, half, R3 // 2, 1, N, R3 // 2, False).to(
            tl.float32
        )
        cosines = load_block(cos + image * angle_image, block * ROWS, m, half, R3 // 2, 1, N, R3 // 2, False).to(
            tl.float32
        )
    end = N
    if MASK == CAUSAL:
        end = tl.minimum(N, (block + 1) * ROWS)
    output = tl.zeros((ROWS, WIDTH2T), tl.float32)
    if MASK:
        mask += image * mask_image + first_head.to(tl.int64) * mask_head

    for head in range(first_head, end_head):
        core = load_block(pre + head * (R2 * R3), 0, c2, c3, R3, 1, R2, R3, EMULATE)
        q = product(tokens, core)
        if ROPE:
            q = rotate(q, sines, cosines)
        q = rounded(q * (scale * LOG2E), LOW, EMULATE)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        mixed = tl.zeros((ROWS, WIDTH3T), tl.float32)
        for start in range(0, end, COLUMNS):
            keys = load_block(k, start, n, c3, k_row, k_column, N, R3, EMULATE)
            scores = product(q, tl.trans(keys))
            scores = masked_scores(
                scores, mask, block * ROWS, start, m[:, None], n[None, :], mask_row, mask_column, N, MASK
            )
            new_top = tl.maximum(top, tl.max(scores, 1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing but masked scores so far
            weights = tl.exp2(scores - shift[:, None])
            decay = tl.exp2(top - shift)
            total = total * decay + tl.sum(weights, 1)
            values = load_block(v, start, n, c3t, v_row, v_column, N, R3T, EMULATE)
            mixed = mixed * decay[:, None] + product(rounded(weights, LOW, EMULATE), values)
            top = new_top
        empty = total == 0.0
        mixed = mixed / tl.where(empty, 1.0, total)[:, None]
        core = load_block(post + head * (R2T * R3T), 0, c2t, c3t, R3T, 1, R2T, R3T, EMULATE)
        output += product(rounded(mixed, LOW, EMULATE), tl.trans(core))
        log_sum = tl.where(empty, float("inf"), top + tl.log2(tl.where(empty, 1.0, total)))
        tl.store(lse + (image * H + head) * N + rows, log_sum, mask=rows < N)
        if MASK:
            mask += mask_head

    store_block(z + (part * B + image) * N * R2T, output, block * ROWS, m, c2t, R2T, N, R2T, EMULATE)
