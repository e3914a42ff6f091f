"""The backward kernel over blocks of rows (queries), and the plan of the backward pass. No atomics: runs repeat bit by bit.

With dY_i = dZ S_i, weights A_i = softmax(scale Q_i K^T) recomputed from the log-sum-exp, and delta_i = rowsum(dY_i * Y_i):

    dA_i = dY_i V^T;  dE_i = A_i * (dA_i - delta_i), the gradient of the scores
    rows:   Y_i = A_i V;  dQ_i = scale dE_i K               stored for a bounded number of images; from them, by large products,
            dP = sum_i dQ_i T_i^T;  dT_i = P^T dQ_i;  dS_i = dZ^T Y_i
    keys:   dK = scale sum_i dE_i^T Q_i;  dV = sum_i A_i^T dY_i           (``backward_keys``)

Source: the chain rule for arXiv 2603.30033, Eqs 2-6; delta and the recomputed weights as in FlashAttention-2, arXiv 2307.08691.
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


@triton.jit(do_not_specialize=["N", "H"])
def rows_kernel(
    p: "Address",
    k: "Address",
    v: "Address",
    pre: "Address",
    post: "Address",
    sin: "Address",
    cos: "Address",
    mask: "Address",
    dz: "Address",
    lse: "Address",
    delta: "Address",
    dq: "Address",
    y: "Address",
    q: "Address",
    dy: "Address",
    scale: "Scalar",
    N: "Scalar",
    H: "Scalar",
    p_image: "Scalar",
    p_row: "Scalar",
    p_column: "Scalar",
    k_image: "Scalar",
    k_row: "Scalar",
    k_column: "Scalar",
    v_image: "Scalar",
    v_row: "Scalar",
    v_column: "Scalar",
    dz_image: "Scalar",
    dz_row: "Scalar",
    dz_column: "Scalar",
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
    """Computes ROWS rows of one head of one image: delta (B, H, N), dQ and Q (B, N, H, r3), Y and dY (B, N, H, r3t).

    Q is stored as the scores need it: times scale log2(e), and rotated with RoPE. Program numbers run over row blocks, then
    heads,
    then images. Other arguments as of ``forward_kernel``.

    Args:
        dz, dz_image, dz_row, dz_column: gradient of the outputs (B, N, r2t), and its strides.
        delta, dq, y, q, dy: memory for the results.
    """
    row_blocks = tl.cdiv(N, ROWS)
    number = tl.program_id(0)
    block = number % row_blocks
    head = (number // row_blocks) % H
    image = (number // row_blocks // H).to(tl.int64)

    m, n = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    rows = block * ROWS + m
    c2, c3 = tl.arange(0, WIDTH2), tl.arange(0, WIDTH3)
    c2t, c3t = tl.arange(0, WIDTH2T), tl.arange(0, WIDTH3T)
    k += image * k_image
    v += image * v_image
    if MASK:
        mask += image * mask_image + head.to(tl.int64) * mask_head
    end = N
    if MASK == CAUSAL:
        end = tl.minimum(N, (block + 1) * ROWS)

    tokens = load_block(p + image * p_image, block * ROWS, m, c2, p_row, p_column, N, R2, EMULATE)
    core = load_block(pre + head * (R2 * R3), 0, c2, c3, R3, 1, R2, R3, EMULATE)
    queries = product(tokens, core)
    if ROPE:
        half = tl.arange(0, WIDTH3 // 2)
        sines = load_block(sin + image * angle_image, block * ROWS, m, half, R3 // 2, 1, N, R3 // 2, False).to(
            tl.float32
        )
        cosines = load_block(cos + image * angle_image, block * ROWS, m, half, R3 // 2, 1, N, R3 // 2, False).to(
            tl.float32
        )
        queries = rotate(queries, sines, cosines)
    queries = rounded(queries * (scale * LOG2E), LOW, EMULATE)
    gradients = load_block(dz + image * dz_image, block * ROWS, m, c2t, dz_row, dz_column, N, R2T, EMULATE)
    core = load_block(post + head * (R2T * R3T), 0, c2t, c3t, R3T, 1, R2T, R3T, EMULATE)
    gradients = rounded(product(gradients, core), LOW, EMULATE)
    at = image * N * H
    store_block(q + (at + head) * R3, queries, block * ROWS, m, c3, H * R3, N, R3, EMULATE)
    store_block(dy + (at + head) * R3T, gradients, block * ROWS, m, c3t, H * R3T, N, R3T, EMULATE)
    log_sum = tl.load(lse + at + head * N + rows, mask=rows < N, other=float("inf"))

    mixed = tl.zeros((ROWS, WIDTH3T), tl.float32)
    for start in range(0, end, COLUMNS):
        keys = load_block(k, start, n, c3, k_row, k_column, N, R3, EMULATE)
        scores = product(queries, tl.trans(keys))
        scores = masked_scores(
            scores, mask, block * ROWS, start, m[:, None], n[None, :], mask_row, mask_column, N, MASK
        )
        weights = tl.exp2(scores - log_sum[:, None])
        values = load_block(v, start, n, c3t, v_row, v_column, N, R3T, EMULATE)
        mixed += product(rounded(weights, LOW, EMULATE), values)
    store_block(y + (at + head) * R3T, mixed, block * ROWS, m, c3t, H * R3T, N, R3T, EMULATE)
    share = tl.sum(mixed * gradients.to(tl.float32), 1)
    tl.store(delta + at + head * N + rows, share, mask=rows < N)

    dqueries = tl.zeros((ROWS, WIDTH3), tl.float32)
    for start in range(0, end, COLUMNS):
        keys = load_block(k, start, n, c3, k_row, k_column, N, R3, EMULATE)
        scores = product(queries, tl.trans(keys))
        scores = masked_scores(
            scores, mask, block * ROWS, start, m[:, None], n[None, :], mask_row, mask_column, N, MASK
        )
        weights = tl.exp2(scores - log_sum[:, None])
        values = load_block(v, start, n, c3t, v_row, v_column, N, R3T, EMULATE)
        dscores = weights * (product(gradients, tl.trans(values)) - share[:, None])
        dqueries += product(rounded(dscores, LOW, EMULATE), keys)
    dqueries *= scale
    if ROPE:
        dqueries = rotate(dqueries, -sines, cosines)
    store_block(dq + (at + head) * R3, dqueries, block * ROWS, m, c3, H * R3, N, R3, EMULATE)
