"""The backward kernels: one over blocks of rows (queries), one over blocks of columns (keys). No atomics: runs repeat bit by bit.

With dY_i = dZ S_i, weights A_i = softmax(scale Q_i K^T) recomputed from the log-sum-exp, and delta_i = rowsum(dY_i * Y_i):

    dA_i = dY_i V^T;  dS_i = A_i * (dA_i - delta_i)
    rows:   Y_i = A_i V;  dQ_i = scale dS_i K               stored for a bounded number of images; from them, by large products,
            dP = sum_i dQ_i T_i^T;  dT_i = P^T dQ_i;  dS-core_i = dZ^T Y_i
    keys:   dK = scale sum_i dS_i^T Q_i;  dV = sum_i A_i^T dY_i

The kernel over keys needs Q_i and dY_i for each block of keys again. FOLD says from where:

    FOLD      the cores go into the keys and values: K T_i^T (r2 wide) meets P, V S_i^T (r2t wide) meets dZ, and the sums
              G = dS_i^T P and W = A_i^T dZ go back through the cores once per head. P and dZ serve all heads, so little is read,
              but four sums are held at once: for small ranks.
    not FOLD  the kernel over rows stores Q_i (rotated, with RoPE) and dY_i beside dQ_i and Y_i. Two sums are held, the scores
              are those of the forward pass to the last bit, and no queries are formed or rotated in the inner loop.
"""

import triton
import triton.language as tl

from vit_tucker.attention.triton_tucker.blocks import (
    CAUSAL,
    LN2,
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


@triton.jit
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
    FOLD: tl.constexpr,
    LOW: tl.constexpr,
    EMULATE: tl.constexpr,
) -> None:
    """One block of ROWS rows of one head of one image: delta (B, H, N), dQ (B, N, H, r3), Y (B, N, H, r3t); see the module.

    Without FOLD also ``q``, scaled by scale log2(e) and rotated, and ``dy``, shaped as dQ and Y. Program numbers run over row
    blocks, then heads, then images. Other arguments as in ``forward_kernel``.
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

    tokens = load_block(p + image * p_image, rows, c2, p_row, p_column, N, R2, EMULATE)
    core = load_block(pre + head * (R2 * R3), c2, c3, R3, 1, R2, R3, EMULATE)
    queries = product(tokens, core)
    if ROPE:
        half = tl.arange(0, WIDTH3 // 2)
        sines = load_block(sin + image * angle_image, rows, half, R3 // 2, 1, N, R3 // 2, False).to(tl.float32)
        cosines = load_block(cos + image * angle_image, rows, half, R3 // 2, 1, N, R3 // 2, False).to(tl.float32)
        queries = rotate(queries, sines, cosines)
    queries = rounded(queries * (scale * LOG2E), LOW, EMULATE)
    gradients = load_block(dz + image * dz_image, rows, c2t, dz_row, dz_column, N, R2T, EMULATE)
    core = load_block(post + head * (R2T * R3T), c2t, c3t, R3T, 1, R2T, R3T, EMULATE)
    gradients = rounded(product(gradients, core), LOW, EMULATE)
    at = image * N * H
    if not FOLD:
        store_block(q + (at + head) * R3, queries, rows, c3, H * R3, N, R3, EMULATE)
        store_block(dy + (at + head) * R3T, gradients, rows, c3t, H * R3T, N, R3T, EMULATE)
    log_sum = tl.load(lse + at + head * N + rows, mask=rows < N, other=float("inf"))

    mixed = tl.zeros((ROWS, WIDTH3T), tl.float32)
    for start in range(0, end, COLUMNS):
        columns = start + n
        keys = load_block(k, columns, c3, k_row, k_column, N, R3, EMULATE)
        scores = product(queries, tl.trans(keys))
        scores = masked_scores(
                scores, mask, block * ROWS, start, m[:, None], n[None, :], mask_row, mask_column, N, MASK
            )
        weights = tl.exp2(scores - log_sum[:, None])
        values = load_block(v, columns, c3t, v_row, v_column, N, R3T, EMULATE)
        mixed += product(rounded(weights, LOW, EMULATE), values)
    store_block(y + (at + head) * R3T, mixed, rows, c3t, H * R3T, N, R3T, EMULATE)
    share = tl.sum(mixed * gradients.to(tl.float32), 1)
    tl.store(delta + at + head * N + rows, share, mask=rows < N)

    dqueries = tl.zeros((ROWS, WIDTH3), tl.float32)
    for start in range(0, end, COLUMNS):
        columns = start + n
        keys = load_block(k, columns, c3, k_row, k_column, N, R3, EMULATE)
        scores = product(queries, tl.trans(keys))
        scores = masked_scores(
                scores, mask, block * ROWS, start, m[:, None], n[None, :], mask_row, mask_column, N, MASK
            )
        weights = tl.exp2(scores - log_sum[:, None])
        values = load_block(v, columns, c3t, v_row, v_column, N, R3T, EMULATE)
        dscores = weights * (product(gradients, tl.trans(values)) - share[:, None])
        dqueries += product(rounded(dscores, LOW, EMULATE), keys)
    dqueries *= scale
    if ROPE:
        dqueries = rotate(dqueries, -sines, cosines)
    store_block(dq + (at + head) * R3, dqueries, rows, c3, H * R3, N, R3, EMULATE)


@triton.jit
def keys_kernel(
    a: "Address",
    d: "Address",
    k: "Address",
    v: "Address",
    pre: "Address",
    post: "Address",
    mask: "Address",
    lse: "Address",
    delta: "Address",
    dk: "Address",
    dv: "Address",
    scale: "Scalar",
    B: "Scalar",
    N: "Scalar",
    H: "Scalar",
    splits: "Scalar",
    a_image: "Scalar",
    a_row: "Scalar",
    a_column: "Scalar",
    d_image: "Scalar",
    d_row: "Scalar",
    d_column: "Scalar",
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
    FOLD: tl.constexpr,
    LOW: tl.constexpr,
    EMULATE: tl.constexpr,
) -> None:
    """One block of COLUMNS keys of one image, for one part of the heads: dk (splits, B, N, r3) and dv (splits, B, N, r3t).

    With FOLD ``a`` is P and ``d`` is dZ, else they are the buffers ``q`` and ``dy`` of ``rows_kernel``. Scores and their
    gradients are held transposed, (COLUMNS, ROWS), as products with them want it.
    """
    blocks = tl.cdiv(N, COLUMNS)
    number = tl.program_id(0)
    block = number % blocks
    part = (number // blocks) % splits
    image = (number // blocks // splits).to(tl.int64)
    first_head = part * H // splits
    end_head = (part + 1) * H // splits

    m, n = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    columns = block * COLUMNS + n
    c2, c3 = tl.arange(0, WIDTH2), tl.arange(0, WIDTH3)
    c2t, c3t = tl.arange(0, WIDTH2T), tl.arange(0, WIDTH3T)
    keys = load_block(k + image * k_image, columns, c3, k_row, k_column, N, R3, EMULATE)
    values = load_block(v + image * v_image, columns, c3t, v_row, v_column, N, R3T, EMULATE)
    a += image * a_image
    d += image * d_image
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
        if FOLD:
            pre_core = load_block(pre + head * (R2 * R3), c2, c3, R3, 1, R2, R3, EMULATE)
            post_core = load_block(post + head * (R2T * R3T), c2t, c3t, R3T, 1, R2T, R3T, EMULATE)
            folded_keys = rounded(product(keys, tl.trans(pre_core)) * (scale * LOG2E), LOW, EMULATE)
            folded_values = rounded(product(values, tl.trans(post_core)), LOW, EMULATE)
            sum_keys = tl.zeros((COLUMNS, WIDTH2), tl.float32)
            sum_values = tl.zeros((COLUMNS, WIDTH2T), tl.float32)
        for start in range(first, N, ROWS):
            rows = start + m
            log_sum = tl.load(lse + head * N + rows, mask=rows < N, other=float("inf"))
            share = tl.load(delta + head * N + rows, mask=rows < N, other=0.0)
            if FOLD:
                queries = load_block(a, rows, c2, a_row, a_column, N, R2, EMULATE)
                scores = product(folded_keys, tl.trans(queries))
            else:
                queries = load_block(a + head * R3, rows, c3, a_row, a_column, N, R3, EMULATE)
                scores = product(keys, tl.trans(queries))
            scores = masked_scores(
                scores, mask, start, block * COLUMNS, m[None, :], n[:, None], mask_row, mask_column, N, MASK
            )
            weights = tl.exp2(scores - log_sum[None, :])
            if FOLD:
                gradients = load_block(d, rows, c2t, d_row, d_column, N, R2T, EMULATE)
                sum_values += product(rounded(weights, LOW, EMULATE), gradients)
                dweights = product(folded_values, tl.trans(gradients))
            else:
                gradients = load_block(d + head * R3T, rows, c3t, d_row, d_column, N, R3T, EMULATE)
                dvalues += product(rounded(weights, LOW, EMULATE), gradients)
                dweights = product(values, tl.trans(gradients))
            dscores = rounded(weights * (dweights - share[None, :]), LOW, EMULATE)
            if FOLD:
                sum_keys += product(dscores, queries)
            else:
                dkeys += product(dscores, queries)
        if FOLD:
            dkeys += product(rounded(sum_keys, LOW, EMULATE), pre_core)
            dvalues += product(rounded(sum_values, LOW, EMULATE), post_core)
        if MASK:
            mask += mask_head

    dkeys *= scale if FOLD else LN2  # the stored queries hold scale log2(e)
    at = (part * B + image) * N
    store_block(dk + at * R3, dkeys, columns, c3, R3, N, R3, EMULATE)
    store_block(dv + at * R3T, dvalues, columns, c3t, R3T, N, R3T, EMULATE)
