"""Attention layers that ours are measured against: timm's, and those that one would write down from the papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models import vision_transformer
from torch import Tensor, nn
from torch.nn import functional as F

from vit_tucker.attention.variants.tucker.layer import TuckerAttention

Attention: Any = vision_transformer.Attention
"""timm's, from where all its versions have it."""


def dense(dim: int, heads: int) -> nn.Module:
    """Makes timm's Attention, as its ViTs have it: the layer that all speed-ups refer to."""
    return Attention(dim, heads, qkv_bias=True)


def unfused(dim: int, heads: int) -> nn.Module:
    """The same with timm's fused_attn off: plain products."""
    layer = Attention(dim, heads, qkv_bias=True)
    layer.fused_attn = False
    return layer


def attention_rope(dim: int, heads: int, kv_heads: int | None = None, prefix: int = 1) -> nn.Module:
    """Makes timm's AttentionRope: dense, with one projection for all, or with fewer key/value heads."""
    from timm.layers import AttentionRope

    return AttentionRope(
        dim, heads, num_kv_heads=kv_heads, qkv_bias=True, qkv_fused=kv_heads is None, num_prefix_tokens=prefix
    )


class Rotated(nn.Module):
    """A layer with timm's axial table of rotations, made once as models without patch dropout do.

    Args:
        build: makes the layer.
        width: D.
        side: of the square grid of patches.
    """

    table: Tensor

    def __init__(self, build: Callable[[], nn.Module], width: int, side: int) -> None:
        super().__init__()
        from timm.layers import RotaryEmbeddingCat

        self.layer = build()
        self.register_buffer("table", RotaryEmbeddingCat(width, feat_shape=[side, side], in_pixels=False).get_embed())

    def forward(self, x: Tensor) -> Tensor:
        """Returns outputs (B, N, C) for tokens (B, N, C)."""
        y: Tensor = self.layer(x, rope=self.table)
        return y


class TextbookMLA(nn.Module):
    """Multi-head latent attention as DeepSeek-V2 writes it (arXiv 2405.04434, Eqs 9-13), without RoPE.

    Args:
        dim, heads: C and H.
        q_rank, kv_rank: widths of the latents.
    """

    def __init__(self, dim: int, heads: int, q_rank: int, kv_rank: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_down, self.q_up = nn.Linear(dim, q_rank, bias=False), nn.Linear(q_rank, dim)
        self.kv_down = nn.Linear(dim, kv_rank, bias=False)
        self.k_up, self.v_up = nn.Linear(kv_rank, dim), nn.Linear(kv_rank, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Returns outputs (B, N, C) for tokens (B, N, C)."""
        latent = self.kv_down(x)
        q, k, v = (self.split(t) for t in (self.q_up(self.q_down(x)), self.k_up(latent), self.v_up(latent)))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        """Splits (B, N, C) into heads, (B, H, N, D)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class EinsumTucker(nn.Module):
    """Tucker Attention as its equations read (arXiv 2603.30033, Def 2.1, Eqs 2-6), one einsum each, on a layer's own weights.

    Args:
        layer: whose parameters it uses.
    """

    def __init__(self, layer: TuckerAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Returns outputs (B, N, O) for tokens (B, N, C)."""
        layer = self.layer
        p, k, v = layer.latents(x)
        t = torch.einsum("ha,aij->hij", layer.pre_head, layer.pre_core)
        s = torch.einsum("ha,aij->hij", layer.post_head, layer.post_core)
        queries = torch.einsum("bni,hij->bhnj", p, t)
        scores = torch.einsum("bhnj,bmj->bhnm", queries, k) * layer.scale
        averages = torch.einsum("bhnm,bmj->bhnj", scores.softmax(-1), v)
        outputs = torch.einsum("bhnj,hij->bni", averages, s)
        return layer.proj(outputs)


class FactorizedAttention(nn.Module):
    """timm's Attention with its two Linears factorised by tensorly-torch, at about the parameters of a Tucker layer.

    Args:
        dim, heads: C and H.
        factorization: "tucker", "cp" or "blocktt" (tensor train).
        weights: parameters of qkv and proj together.
    """

    def __init__(self, dim: int, heads: int, factorization: str, weights: int) -> None:
        super().__init__()
        from tltorch import FactorizedLinear

        self.heads = heads
        self.attn_drop = nn.Identity()
        share = weights / (4 * dim * dim)
        sides = split_width(dim)
        # the faster of its two implementations for each is the peer
        implementation = "factorized" if factorization == "blocktt" else "reconstructed"
        options: dict[str, Any] = {"factorization": factorization, "rank": share, "implementation": implementation}
        self.qkv = FactorizedLinear(sides, (3 * sides[0], *sides[1:]), bias=True, **options)
        self.proj = FactorizedLinear(sides, sides, bias=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Returns outputs (B, N, C) for tokens (B, N, C)."""
        B, N, C = x.shape
        qkv = self.qkv(x.flatten(0, 1)).reshape(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B * N, C)).reshape(B, N, C)


def split_width(dim: int) -> tuple[int, ...]:
    """C as a product of two numbers close to each other, as tensorly-torch wants the width of a layer."""
    first = max(d for d in range(1, int(dim**0.5) + 1) if dim % d == 0)
    return first, dim // first
