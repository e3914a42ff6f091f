"""Launches of the kernels: tiles, parts of the heads, and the chunks of images of the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from vit_tucker.attention.triton_tucker import tiles
from vit_tucker.attention.triton_tucker.backward_keys import keys_kernel
from vit_tucker.attention.triton_tucker.backward_rows import rows_kernel
from vit_tucker.attention.triton_tucker.forward import forward_kernel
from vit_tucker.attention.triton_tucker.inputs import Inputs

CHUNK_BYTES = 32 * 2**20
"""Bound of what the backward pass stores at once for the images of a chunk; one image may need more."""


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Computes z (B, N, r2t) and the log-sum-exp in base 2, (B, H, N) float32."""
    B, N, H = inputs.sizes
    lse = inputs.p.new_empty(B, H, N, dtype=torch.float32)
    tile = choose("forward", inputs)
    row_blocks = triton.cdiv(N, tile.rows)
    splits = parts(row_blocks * B, inputs)
    z = partial_sums(splits, B, N, inputs.ranks.r2t, inputs.p)
    sin, cos, angle_image = inputs.angle_arguments()
    mask, mask_strides = inputs.mask_arguments()
    forward_kernel[(row_blocks * splits * B,)](
        *(inputs.p, inputs.k, inputs.v, inputs.pre, inputs.post, sin, cos, mask, z, lse),
        *(inputs.scale, B, N, H, splits),
        *(*inputs.p.stride(), *inputs.k.stride(), *inputs.v.stride(), angle_image, *mask_strides),
        **inputs.constants(),
        **options(tile),
        ROPE=inputs.sin is not None,
    )
    return z[0] if splits == 1 else z.sum(0).to(inputs.p.dtype), lse


def backward(dz: Tensor, inputs: Inputs, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of p, k, v, pre and post, in their dtypes.

    Args:
        dz: (B, N, r2t) gradient of the outputs.
        inputs: of the forward pass.
        lse: (B, H, N), as the forward pass returned it.
    """
    p, k, v, pre, post = inputs.p, inputs.k, inputs.v, inputs.pre, inputs.post
    B, dtype = p.shape[0], p.dtype
    dp, dk, dv = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (p, k, v))
    dpre, dpost = (torch.zeros(x.shape[1], x[:, 0].numel(), dtype=torch.float32, device=x.device) for x in (pre, post))
    to_p = pre.transpose(1, 2).flatten(0, 1)  # (H r3, r2)
    for start in range(0, B, size := images_per_chunk(inputs)):
        end = min(start + size, B)
        part, dz_part = inputs.images(start, end), dz[start:end]
        buffers = run_rows(part, dz_part, lse[start:end])
        run_keys(part, lse[start:end], buffers, dk[start:end], dv[start:end])
        dq, y = buffers.dq.flatten(0, 1).flatten(1), buffers.y.flatten(0, 1).flatten(1)  # (images N, H r3), (.., H r3t)
        torch.mm(dq, to_p, out=dp[start:end].flatten(0, 1))
        dpre += part.p.flatten(0, 1).mT @ dq
        dpost += dz_part.flatten(0, 1).mT @ y
    dpre, dpost = (
        d.unflatten(1, (-1, x.shape[2])).transpose(0, 1).to(dtype).contiguous() for d, x in ((dpre, pre), (dpost, post))
    )
    return dp, dk, dv, dpre, dpost


@dataclass(frozen=True)
class Buffers:
    """Results of the kernel over rows for a chunk of images.

    These are dq and q (B, N, H, r3), y and dy (B, N, H, r3t), and delta (B, H, N).
    """

    dq: Tensor
    y: Tensor
    q: Tensor
    dy: Tensor
    delta: Tensor


def images_per_chunk(inputs: Inputs) -> int:
    """Returns how many images ``CHUNK_BYTES`` has room for, at least one."""
    B, N, H = inputs.sizes
    stored = 2 * inputs.p.element_size() * (inputs.ranks.r3 + inputs.ranks.r3t)
    return max(1, min(B, CHUNK_BYTES // (N * H * (stored + 4))))


def run_rows(inputs: Inputs, dz: Tensor, lse: Tensor) -> Buffers:
    """Launches the kernel over rows; arguments as of ``backward``."""
    B, N, H = inputs.sizes
    dq, q = (inputs.p.new_empty(B, N, H, inputs.ranks.r3) for _ in range(2))
    y, dy = (inputs.p.new_empty(B, N, H, inputs.ranks.r3t) for _ in range(2))
    delta = torch.empty_like(lse)
    tile = choose("rows", inputs)
    sin, cos, angle_image = inputs.angle_arguments()
    mask, mask_strides = inputs.mask_arguments()
    rows_kernel[(triton.cdiv(N, tile.rows) * H * B,)](
        *(inputs.p, inputs.k, inputs.v, inputs.pre, inputs.post, sin, cos, mask, dz, lse, delta, dq, y, q, dy),
        *(inputs.scale, N, H),
        *(*inputs.p.stride(), *inputs.k.stride(), *inputs.v.stride(), *dz.stride(), angle_image, *mask_strides),
        **inputs.constants(),
        **options(tile),
        ROPE=inputs.sin is not None,
    )
    return Buffers(dq, y, q, dy, delta)


def run_keys(inputs: Inputs, lse: Tensor, buffers: Buffers, dk: Tensor, dv: Tensor) -> None:
    """Launches the kernel over keys.

    Args:
        inputs: of the forward pass.
        lse: (B, H, N), as the forward pass returned it.
        buffers: from ``run_rows``.
        dk, dv: (B, N, r3) and (B, N, r3t), overwritten.
    """
    B, N, H = inputs.sizes
    tile = choose("keys", inputs)
    blocks = triton.cdiv(N, tile.columns)
    splits = parts(blocks * B, inputs)
    sums = [x[None] if splits == 1 else partial_sums(splits, B, N, x.shape[2], x) for x in (dk, dv)]
    mask, mask_strides = inputs.mask_arguments()
    keys_kernel[(blocks * splits * B,)](
        *(buffers.q, buffers.dy, inputs.k, inputs.v, mask, lse, buffers.delta, *sums),
        *(B, N, H, splits, *inputs.k.stride(), *inputs.v.stride(), *mask_strides),
        **{name: value for name, value in inputs.constants().items() if not name.startswith(("R2", "WIDTH2"))},
        **options(tile),
    )
    if splits > 1:
        dk.copy_(sums[0].sum(0))
        dv.copy_(sums[1].sum(0))


def choose(kernel: tiles.KernelName, inputs: Inputs) -> tiles.Tile:
    """Returns the kernel's tile on this device.

    Raises:
        ValueError: no tile fits the device.
    """
    size, rope = inputs.p.element_size(), inputs.sin is not None
    tile = tiles.choose(kernel, inputs.ranks, size, rope, inputs.mask is not None, tiles.shared_memory(inputs.p.device))
    if tile is None:
        raise ValueError(
            f"no tile of the {kernel} kernel for the ranks {tuple(inputs.ranks)} fits this device's shared memory"
        )
    return tile


def options(tile: tiles.Tile) -> dict[str, int]:
    """Returns a tile as keyword arguments of a launch."""
    return {"ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.warps, "num_stages": tile.stages}


def parts(programs: int, inputs: Inputs) -> int:
    """Returns into how many parts the heads go, see ``tiles.parts_of_heads``."""
    return tiles.parts_of_heads(programs, inputs.sizes[2], tiles.multiprocessors(inputs.p.device))


def partial_sums(splits: int, B: int, N: int, rank: int, like: Tensor) -> Tensor:
    """Allocates (splits, B, N, rank), float32 if there is anything to add.

    Args:
        splits: parts of the heads.
        B, N, rank: images, tokens and columns.
        like: a tensor (any shape) of the device and dtype.
    """
    return like.new_empty(splits, B, N, rank, dtype=like.dtype if splits == 1 else torch.float32)
