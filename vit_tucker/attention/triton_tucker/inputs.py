"""Collects the tensors that both passes read, and turns them into arguments of the kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vit_tucker.attention.triton_tucker import tiles
from vit_tucker.attention.triton_tucker.forward import forward_kernel

LOW = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Inputs:
    """The tensors and options that the kernels of both passes read.

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
        """Returns the inputs of a call; cores and angles, which are small, are copied if they are not contiguous.

        Args:
            p, k, v, pre, post: see ``TuckerCall``: (B, N, r2), (B, N, r3), (B, N, r3t), (H, r2, r3), (H, r2t, r3t).
            attn_mask: boolean (True: attend) or additive, broadcasts to (B, H, N, N); None for none.
            sin, cos: (N, r3/2) or (B, N, r3/2), or None.
            scale: factor on the scores.
            is_causal: instead of a mask.
        """
        mask = None
        if attn_mask is not None and not is_causal:
            mask = attn_mask.expand(p.shape[0], pre.shape[0], p.shape[1], p.shape[1])
            mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        sin, cos = (None if angle is None else angle.contiguous() for angle in (sin, cos))
        return cls(p, k, v, pre.contiguous(), post.contiguous(), mask, sin, cos, scale, is_causal)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Returns the numbers of images, tokens and heads: B, N, H."""
        return self.p.shape[0], self.p.shape[1], self.pre.shape[0]

    @property
    def ranks(self) -> tiles.Ranks:
        """Returns the ranks r2, r3, r2t, r3t."""
        return tiles.Ranks(*self.pre.shape[1:], *self.post.shape[1:])

    def images(self, start: int, end: int) -> Inputs:
        """Returns the same for some of the images: views."""
        angles = (a if a is None or a.ndim == 2 else a[start:end] for a in (self.sin, self.cos))
        mask = None if self.mask is None else self.mask[start:end]
        p, k, v = (x[start:end] for x in (self.p, self.k, self.v))
        sin, cos = angles
        return replace(self, p=p, k=k, v=v, mask=mask, sin=sin, cos=cos)

    def constants(self) -> dict[str, Any]:
        """Returns compile-time constants that all kernels have."""
        kind = 3 if self.is_causal else 0 if self.mask is None else 1 if self.mask.dtype == torch.uint8 else 2
        return {
            **tiles.rank_constants(self.ranks),
            "MASK": kind,
            "LOW": LOW[self.p.dtype],
            "EMULATE": interpreted() and self.p.dtype == torch.bfloat16,
        }

    def mask_arguments(self) -> tuple[Tensor, tuple[int, ...]]:
        """Returns the mask, or any tensor in its place, and its strides."""
        return (self.p, (0,) * 4) if self.mask is None else (self.mask, self.mask.stride())

    def angle_arguments(self) -> tuple[Tensor, Tensor, int]:
        """Returns sines, cosines, or any tensor in their place, and their stride from image to image."""
        if self.sin is None or self.cos is None:
            return self.p, self.p, 0
        return self.sin, self.cos, self.sin.stride(0) if self.sin.ndim == 3 else 0


def interpreted() -> bool:
    """Returns whether the kernels are objects of Triton's interpreter."""
    return not isinstance(forward_kernel, triton.runtime.JITFunction)
