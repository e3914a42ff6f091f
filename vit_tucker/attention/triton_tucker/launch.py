"""Launches of the kernels: shapes, strides, tiles, parts of the heads, and the chunks of images of the backward pass."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vit_tucker.attention.triton_tucker import tiles
from vit_tucker.attention.triton_tucker.backward import keys_kernel, rows_kernel
from vit_tucker.attention.triton_tucker.forward import forward_kernel

CHUNK_BYTES = 32 * 2**20
"""Bound of what the backward pass stores at once for the images of a chunk; one image may need more."""
LOW = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Inputs:
    """What both passes read.

    Attributes:
        p, k, v: (B, N, r2), (B, N, r3), (B, N, r3t), any strides.
        pre, post: (H, r2, r3), (H, r2t, r3t), contiguous.
        mask: (B, H, N, N), strides 0 where it was broadcast, or None.
        sin, cos: (N, r3/2) or (B, N, r3/2), contiguous, or None.
        scale: factor on the scores.
        is_causal: instead of a mask.
    """

    p: Tensor
    k: Tensor
    v: Tensor
    pre: Tensor
    post: Tensor
    mask: Tensor | None
    sin: Tensor | None
    cos: Tensor | None
    scale: float
    is_causal: bool

    @classmethod
    def of(
        cls,
        p: Tensor,
        k: Tensor,
        v: Tensor,
        pre: Tensor,
        post: Tensor,
        attn_mask: Tensor | None,
        sin: Tensor | None,
        cos: Tensor | None,
        scale: float,
        is_causal: bool,
    ) -> Inputs:
        """Cores and angles, which are small, are copied if they are not contiguous; nothing else is."""
        mask = None
        if attn_mask is not None and not is_causal:
            mask = attn_mask.expand(p.shape[0], pre.shape[0], p.shape[1], p.shape[1])
            mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        sin, cos = (None if angle is None else angle.contiguous() for angle in (sin, cos))
        return cls(p, k, v, pre.contiguous(), post.contiguous(), mask, sin, cos, scale, is_causal)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, N, H."""
        return self.p.shape[0], self.p.shape[1], self.pre.shape[0]

    @property
    def ranks(self) -> tiles.Ranks:
        """r2, r3, r2t, r3t."""
        return tiles.Ranks(*self.pre.shape[1:], *self.post.shape[1:])

    @cached_property
    def widths(self) -> tiles.Ranks:
        """Of the blocks that hold the ranks."""
        return tiles.Ranks(*map(tiles.width, self.ranks))

    @property
    def folds(self) -> bool:
        """Whether the kernel over keys takes the cores into keys and values."""
        return tiles.folds(self.widths, self.sin is not None)

    def images(self, start: int, end: int) -> Inputs:
        """The same for some of the images: views."""
        angles = (a if a is None or a.ndim == 2 else a[start:end] for a in (self.sin, self.cos))
        mask = None if self.mask is None else self.mask[start:end]
        p, k, v = (x[start:end] for x in (self.p, self.k, self.v))
        sin, cos = angles
        return replace(self, p=p, k=k, v=v, mask=mask, sin=sin, cos=cos)

    def constants(self) -> dict[str, Any]:
        """Compile-time constants that all kernels have."""
        kind = 3 if self.is_causal else 0 if self.mask is None else 1 if self.mask.dtype == torch.uint8 else 2
        names = ("2", "3", "2T", "3T")
        return {
            **{f"R{name}": rank for name, rank in zip(names, self.ranks, strict=True)},
            **{f"WIDTH{name}": width for name, width in zip(names, self.widths, strict=True)},
            "MASK": kind,
            "LOW": LOW[self.p.dtype],
            "EMULATE": interpreted() and self.p.dtype == torch.bfloat16,
        }

    def mask_arguments(self) -> tuple[Tensor, tuple[int, ...]]:
        """The mask, or any tensor in its place, and its strides."""
        return (self.p, (0,) * 4) if self.mask is None else (self.mask, self.mask.stride())

    def angle_arguments(self) -> tuple[Tensor, Tensor, int]:
        """Sines, cosines, or any tensor in their place, and their stride from image to image."""
        if self.sin is None or self.cos is None:
            return self.p, self.p, 0
        return self.sin, self.cos, self.sin.stride(0) if self.sin.ndim == 3 else 0


def interpreted() -> bool:
    """Whether the kernels are objects of Triton's interpreter."""
    return not isinstance(forward_kernel, triton.runtime.JITFunction)


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """z (B, N, r2t) and the log-sum-exp in base 2, (B, H, N) float32."""
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
    return added(z, inputs.p.dtype), lse


def backward(dz: Tensor, inputs: Inputs, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of p, k, v, pre and post, in their dtypes."""
    p, k, v, pre, post = inputs.p, inputs.k, inputs.v, inputs.pre, inputs.post
    (B, N, _), dtype = p.shape, p.dtype
    dp, dk, dv = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (p, k, v))
    dpre, dpost = (torch.zeros(x.shape[1], x[:, 0].numel(), dtype=torch.float32, device=x.device) for x in (pre, post))
    to_p = pre.transpose(1, 2).flatten(0, 1)  # (H r3, r2)
    for start in range(0, B, size := images_per_chunk(inputs)):
        end = min(start + size, B)
        part, dz_part = inputs.images(start, end), dz[start:end]
        buffers = run_rows(part, dz_part, lse[start:end])
        run_keys(part, dz_part, lse[start:end], buffers, dk[start:end], dv[start:end])
        dq, y = buffers.dq.flatten(0, 1).flatten(1), buffers.y.flatten(0, 1).flatten(1)  # (images N, H r3), (.., H r3t)
        torch.mm(dq, to_p, out=dp[start:end].flatten(0, 1))
        dpre += part.p.flatten(0, 1).mT @ dq
        dpost += dz_part.flatten(0, 1).mT @ y
    dcores = (d.unflatten(1, (-1, x.shape[2])).transpose(0, 1).to(dtype) for d, x in ((dpre, pre), (dpost, post)))
    return dp, dk, dv, *(d.contiguous() for d in dcores)  # type: ignore[return-value]


@dataclass(frozen=True)
class Buffers:
    """What the kernel over rows leaves for a chunk of images: dq, q (B, N, H, r3), y, dy (B, N, H, r3t), delta (B, H, N)."""

    dq: Tensor
    y: Tensor
    q: Tensor
    dy: Tensor
    delta: Tensor


def images_per_chunk(inputs: Inputs) -> int:
    """As many images as ``CHUNK_BYTES`` has room for, at least one."""
    B, N, H = inputs.sizes
    stored = (1 if inputs.folds else 2) * inputs.p.element_size() * (inputs.ranks.r3 + inputs.ranks.r3t)
    return max(1, min(B, CHUNK_BYTES // (N * H * (stored + 4))))


def run_rows(inputs: Inputs, dz: Tensor, lse: Tensor) -> Buffers:
    """The kernel over rows."""
    B, N, H = inputs.sizes
    dq, y = (inputs.p.new_empty(B, N, H, rank) for rank in (inputs.ranks.r3, inputs.ranks.r3t))
    q, dy = (dq, y) if inputs.folds else (torch.empty_like(dq), torch.empty_like(y))
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
        FOLD=inputs.folds,
    )
    return Buffers(dq, y, q, dy, delta)


def run_keys(inputs: Inputs, dz: Tensor, lse: Tensor, buffers: Buffers, dk: Tensor, dv: Tensor) -> None:
    """The kernel over keys; writes dk (B, N, r3) and dv (B, N, r3t)."""
    B, N, H = inputs.sizes
    tile = choose("keys", inputs)
    blocks = triton.cdiv(N, tile.columns)
    splits = parts(blocks * B, inputs)
    sums = [x[None] if splits == 1 else partial_sums(splits, B, N, x.shape[2], x) for x in (dk, dv)]
    if inputs.folds:
        a, d = inputs.p, dz
    else:
        a, d = buffers.q[:, :, 0], buffers.dy[:, :, 0]  # the kernel walks over the heads
    mask, mask_strides = inputs.mask_arguments()
    keys_kernel[(blocks * splits * B,)](
        *(a, d, inputs.k, inputs.v, inputs.pre, inputs.post, mask, lse, buffers.delta, *sums),
        *(inputs.scale, B, N, H, splits),
        *(*a.stride(), *d.stride(), *inputs.k.stride(), *inputs.v.stride(), *mask_strides),
        **inputs.constants(),
        **options(tile),
        FOLD=inputs.folds,
    )
    if splits > 1:
        dk.copy_(sums[0].sum(0))
        dv.copy_(sums[1].sum(0))


def choose(kernel: tiles.KernelName, inputs: Inputs) -> tiles.Tile:
    """The kernel's tile on this device."""
    size, rope = inputs.p.element_size(), inputs.sin is not None
    tile = tiles.choose(
        kernel, inputs.widths, size, rope, inputs.mask is not None, tiles.shared_memory(inputs.p.device)
    )
    if tile is None:
        raise ValueError(f"no tile of the {kernel} kernel for the ranks {tuple(inputs.ranks)} fits this device's shared memory")
    return tile


def options(tile: tiles.Tile) -> dict[str, int]:
    """A tile as keyword arguments of a launch."""
    return {"ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.warps, "num_stages": tile.stages}


def parts(programs: int, inputs: Inputs) -> int:
    """Into how many parts the heads go, see ``tiles.parts_of_heads``."""
    return tiles.parts_of_heads(programs, inputs.sizes[2], tiles.multiprocessors(inputs.p.device))


def partial_sums(splits: int, B: int, N: int, rank: int, like: Tensor) -> Tensor:
    """(splits, B, N, rank), float32 if there is anything to add."""
    return like.new_empty(splits, B, N, rank, dtype=like.dtype if splits == 1 else torch.float32)


def added(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """(splits, ...) -> their sum."""
    return sums[0] if sums.shape[0] == 1 else sums.sum(0).to(dtype)
