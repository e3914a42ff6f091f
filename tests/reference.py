"""Random hosts and weights, and attention by its formula: the reference of the tests."""

from typing import Any

import torch
from torch import nn

import vit_tucker
from vit_tucker.attention.host import HostSpec, MHAWeights
from vit_tucker.attention.rope import RopeSpec


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random values of order 1/sqrt(fan-in) for all parameters: timm starts biases at zero, which would hide lost ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1) * 0.1)
    return module


def make_spec(**options: Any) -> HostSpec:
    """A host of 4 heads of width 6 on 24 channels."""
    return HostSpec(**{"embed_dim": 24, "num_heads": 4, "head_dim": 6, "out_dim": 24, **options})


def make_weights(spec: HostSpec, seed: int = 0, dtype: torch.dtype = torch.float64) -> MHAWeights:
    """Random dense weights and biases for a spec."""
    g = torch.Generator().manual_seed(seed)
    h, d = spec.num_heads, spec.head_dim

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * shape[-2 if len(shape) > 2 else -1] ** -0.5).to(
            dtype
        )

    weights = {name: normal(h, spec.embed_dim, d) for name in ("query", "key", "value")}
    biases = {f"{name}_bias": normal(h, d) for name in ("query", "key", "value")} if spec.qkv_bias else {}
    if not spec.key_bias:
        biases.pop("key_bias", None)
    out_bias = normal(spec.out_dim) if spec.proj_bias else None
    return MHAWeights(**weights, **biases, out=normal(h, d, spec.out_dim), out_bias=out_bias)


def make_angles(spec: HostSpec, num_tokens: int = 9) -> torch.Tensor | None:
    """Angles of a host's rotations, (N', D/2), or (H, N', D/2) for mixed RoPE; linear in a 1-D position."""
    if spec.rope is None:
        return None
    pairs = spec.head_dim // 2
    frequencies = torch.linspace(0.2, 1.7, spec.num_heads * pairs, dtype=torch.float64).unflatten(0, (-1, pairs))
    position = torch.arange(num_tokens - spec.rope.num_prefix_tokens, dtype=torch.float64)
    return position[:, None] * (frequencies[:, None] if spec.rope.per_head else frequencies[0])


def make_table(angles: torch.Tensor, half: bool) -> torch.Tensor:
    """The table that timm hands a block for such angles: sines, then cosines. (..., N', D/2) -> (..., N', 2 D)"""
    both = torch.cat([angles, angles], -1) if half else angles.repeat_interleave(2, -1)
    return torch.cat([both.sin(), both.cos()], -1)


def rope_of(spec: HostSpec, num_tokens: int = 9) -> dict[str, torch.Tensor]:
    """What a block hands its attention besides the tokens: {} or {"rope": table}."""
    angles = make_angles(spec, num_tokens)
    return {} if angles is None else {"rope": make_table(angles, spec.rope.half)}


def rotated(x: torch.Tensor, angles: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """Queries or keys of one head (B, N, D), each pair turned as a complex number; prefix tokens stay."""
    pairs = x.unflatten(-1, (2, -1)).mT if rope.half else x.unflatten(-1, (-1, 2))
    z = torch.view_as_complex(pairs.double().contiguous()) * torch.nn.functional.pad(
        torch.polar(torch.ones_like(angles), angles), (0, 0, rope.num_prefix_tokens, 0), value=1.0
    )
    turned = torch.view_as_real(z).to(x.dtype)
    return (turned.mT if rope.half else turned).flatten(-2)


def dense_attention(
    weights: MHAWeights, x: torch.Tensor, spec: HostSpec, scale: float | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Multi-head attention by its formula, head by head: the reference of the tests. x (B, N, C) -> (B, N, O)"""
    out = torch.zeros(*x.shape[:2], weights.out.shape[-1], dtype=x.dtype)
    scale, angles = scale or spec.scale, make_angles(spec, x.shape[1])
    for i in range(weights.query.shape[0]):
        q, k, v = (x @ w[i] for w in (weights.query, weights.key, weights.value))
        if weights.query_bias is not None:
            q, v = q + weights.query_bias[i], v + weights.value_bias[i]
        if weights.key_bias is not None:
            k = k + weights.key_bias[i]
        if angles is not None:
            q, k = (rotated(y, angles[i] if spec.rope.per_head else angles, spec.rope) for y in (q, k))
        scores = scale * q @ k.mT
        if mask is not None:
            scores = scores + mask[:, i]
        out = out + scores.softmax(-1) @ v @ weights.out[i]
    return out if weights.out_bias is None else out + weights.out_bias


def carries(name: str, spec: HostSpec) -> bool:
    """Whether a method says that it keeps all that the host does beyond plain attention."""
    return vit_tucker.get_method(name).carries.issuperset(spec.features)


def all_configs(spec: HostSpec) -> list[vit_tucker.AttentionConfig]:
    """An exact and a compressing config of every registered method that carries what the host does."""
    methods = [vit_tucker.get_method(name) for name in vit_tucker.list_methods() if carries(name, spec)]
    return [config for method in methods for config in (method.full_rank(spec), method.example(spec))]
