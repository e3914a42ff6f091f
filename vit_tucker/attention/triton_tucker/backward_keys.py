"""The backward kernel over blocks of columns (keys): dK and dV, sums over all rows and heads. No atomics.

    dK = scale sum_i dE_i^T Q_i;  dV = sum_i A_i^T dY_i;  dE_i = A_i * (dY_i V^T - delta_i)

Letters as in ``backward_rows``, whose kernel has stored Q_i, rotated with RoPE, and dY_i for the images at hand. To take the
cores into the keys and values instead, K T_i^T against P and V S_i^T against dZ, would spare that memory, but it rounds other
products than the forward pass did: weights no longer add up to one, and dY_i V^T - delta_i no longer cancels where one weight is
near 1. For sharp attention in bfloat16 its error in dV was beyond twice that of plain torch, the bound that the tests set.
"""

import triton
import triton.language as tl

from vit_tucker.attention.triton_tucker.blocks import (
    CAUSAL,
    LN2,
    Address,
    Scalar,
    load_block,
    masked_scores,
    product,
    rounded,
    store_block,
)


@triton.jit(do_not_specialize=["B", "N", "H", "splits"])
def keys_kernel(
    q: "Address",
    dy: "Address",
    k: "Address",
    v: "Address",
    mask: "Address",
    lse: "Address",
    delta: "Address",
    dk: "Address",
    dv: "Address",
    B: "Scalar",
    N: "Scalar",
    H: "Scalar",
    splits: "Scalar",
    k_image: "Scalar",
    k_row: "Scalar",
    k_column: "Scalar",
    v_image: "Scalar",
    v_row: "Scalar",
    v_column: "Scalar",
    mask_image: "Scalar",
    mask_head: "Scalar",
    mask_row: "Scalar",
    mask_column: "Scalar",
    R3: tl.constexpr,
    R3T: tl.constexpr,
    WIDTH3: tl.constexpr,
    WIDTH3T: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASK: tl.constexpr,
    LOW: tl.constexpr,
    EMULATE: tl.constexpr,
) -> None:
    """Computes dk (splits, B, N, r3) and dv (splits, B, N, r3t) of COLUMNS keys of one image, for one part of the heads.

    Program numbers run over blocks of keys, then parts of the heads, then images. Scores and their gradients are held transposed,
    (COLUMNS, ROWS), as the products with them need it. Other arguments as of ``forward_kernel``.

    Args:
        q, dy: (B, N, H, r3), times scale log2(e), and (B, N, H, r3t).
        delta: (B, H, N).
        dk, dv: memory for the results.
    """
    blocks = tl.cdiv(N, COLUMNS)
    number = tl.program_id(0)
    block = number % blocks
    part = (number // blocks) % splits
    image = (number // blocks // splits).to(tl.int64)
    first_head = part * H // splits
    end_head = (part + 1) * H // splits

    m, n = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    c3, c3t = tl.arange(0, WIDTH3), tl.arange(0, WIDTH3T)
    keys = load_block(k + image * k_image, block * COLUMNS, n, c3, k_row, k_column, N, R3, EMULATE)
    values = load_block(v + image * v_image, block * COLUMNS, n, c3t, v_row, v_column, N, R3T, EMULATE)
    q += image * N * H * R3
    dy += image * N * H * R3T
    lse += image * H * N
    delta += image * H * N
    if MASK:
        mask += image * mask_image + first_head.to(tl.int64) * mask_head
    first = 0
    if MASK == CAUSAL:
        first = block * COLUMNS // ROWS * ROWS
    dkeys = tl.zeros((COLUMNS, WIDTH3), tl.float32)
    dvalues = tl.zeros((COLUMNS, WIDTH3T), tl.float32)

    for head in range(first_head, end_head):
        for start in range(first, N, ROWS):
            rows = start + m
            log_sum = tl.load(lse + head * N + rows, mask=rows < N, other=float("inf"))
            share = tl.load(delta + head * N + rows, mask=rows < N, other=0.0)
            queries = load_block(q + head * R3, start, m, c3, H * R3, 1, N, R3, EMULATE)
            scores = product(keys, tl.trans(queries))
            scores = masked_scores(
                scores, mask, start, block * COLUMNS, m[None, :], n[:, None], mask_row, mask_column, N, MASK
            )
            weights = tl.exp2(scores - log_sum[None, :])
            gradients = load_block(dy + head * R3T, start, m, c3t, H * R3T, 1, N, R3T, EMULATE)
            dvalues += product(rounded(weights, LOW, EMULATE), gradients)
            dweights = product(values, tl.trans(gradients))
            dscores = weights * (dweights - share[None, :])
            dkeys += product(rounded(dscores, LOW, EMULATE), queries)
        if MASK:
            mask += mask_head

    at = (part * B + image) * N
    dkeys *= LN2  # the queries hold scale log2(e)
    store_block(dk + at * R3, dkeys, block * COLUMNS, n, c3, R3, N, R3, EMULATE)
    store_block(dv + at * R3T, dvalues, block * COLUMNS, n, c3t, R3T, N, R3T, EMULATE)
