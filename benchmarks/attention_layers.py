"""The layers that ``attention.py`` measures at a shape: ours with their backends, and their peers."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from peers import EinsumTucker, FactorizedAttention, Rotated, TextbookMLA, attention_rope, dense, unfused
from torch import nn

import vit_tucker as vt
from vit_tucker.attention.rope import RopeSpec

EXAMPLE = "8x197x768x12"
HEAD_RANK = 8
DENSE = "dense (timm)"
DENSE_ROPE = "dense, RoPE (timm AttentionRope)"


class Shape(NamedTuple):
    """Batch, tokens, embed_dim, num_heads."""

    batch: int
    tokens: int
    dim: int
    heads: int

    def __str__(self) -> str:
        return "x".join(map(str, tuple(self)))

    @property
    def spec(self) -> vt.HostSpec:
        """The dense layer's."""
        return vt.HostSpec(self.dim, self.heads, self.dim // self.heads, self.dim)

    @property
    def side(self) -> int:
        """Of the largest square grid of patches among the tokens; the others are prefix tokens, which RoPE leaves alone."""
        return math.isqrt(self.tokens - 1)

    @property
    def rope_spec(self) -> vt.HostSpec:
        """The dense layer's with RoPE."""
        return replace(self.spec, rope=RopeSpec(self.tokens - self.side**2))


class Layer(NamedTuple):
    """A layer to measure.

    Attributes:
        build: makes it.
        config: of ours, for its operations; None where they are not counted.
        backend: asked for, or "".
        spec: of the host; None: the shape's.
    """

    build: Callable[[], nn.Module]
    config: vt.AttentionConfig | None = None
    backend: str = ""
    spec: vt.HostSpec | None = None


def parse_shape(text: str) -> Shape:
    """Reads sizes, as in '8x197x768x12'.

    Raises:
        argparse.ArgumentTypeError: not four numbers that fit each other.
    """
    parts = text.split("x")
    if len(parts) != 4 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"shape '{text}': batch x tokens x embed_dim x num_heads, such as {EXAMPLE}")
    shape = Shape(*map(int, parts))
    if shape.dim % shape.heads:
        raise argparse.ArgumentTypeError(f"shape '{text}': {shape.heads} heads do not divide {shape.dim}")
    return shape


def layers_of(shape: Shape, ranks: list[int], backends: list[str], with_peers: bool) -> dict[str, Layer]:
    """What is measured at a shape: timm's dense layer first, then ours, and with ``with_peers`` the others."""
    found = {DENSE: Layer(partial(dense, shape.dim, shape.heads), vt.MHAConfig())}
    for rank in ranks:
        for backend in backends or [""]:
            found |= ours(shape, tucker(shape, rank), backend)
    for backend in backends:
        if backend != "triton":
            found |= ours(shape, vt.MHAConfig(), backend)
    return found | (peers(shape, ranks[0]) if with_peers else {})


def rotated_layers(shape: Shape, ranks: list[int]) -> dict[str, Layer]:
    """The same for hosts with RoPE, against timm's AttentionRope."""
    spec = shape.rope_spec
    assert spec.rope is not None
    timm_layer = partial(attention_rope, shape.dim, shape.heads, prefix=spec.rope.num_prefix_tokens)
    latent = vt.MLAConfig(q_lora_rank=shape.dim // 6, kv_lora_rank=16)
    configs = [*(tucker(shape, rank) for rank in ranks), vt.MHAConfig(), vt.GQAConfig(num_kv_heads=1), latent]
    found = {DENSE_ROPE: Layer(timm_layer, vt.MHAConfig(), spec=spec)}
    found |= {f"{title(config)}, RoPE": Layer(partial(built, config, spec), config, spec=spec) for config in configs}
    found["GQA-1, RoPE (timm AttentionRope)"] = Layer(partial(timm_layer, kv_heads=1))
    return {
        name: layer._replace(build=partial(Rotated, layer.build, spec.head_dim, shape.side))
        for name, layer in found.items()
    }


def tucker(shape: Shape, rank: int) -> vt.TuckerConfig:
    """Tucker Attention with ranks (8, rank, rank), or as many head ranks as there are heads."""
    return vt.TuckerConfig(ranks=(min(HEAD_RANK, shape.heads), rank, rank))


def ours(shape: Shape, config: vt.AttentionConfig, backend: str = "") -> dict[str, Layer]:
    """A layer of ours by its name."""
    config = config.model_copy(update={"backend": backend or "auto"})
    return {
        title(config) + (f", {backend}" if backend else ""): Layer(partial(built, config, shape.spec), config, backend)
    }


def title(config: vt.AttentionConfig) -> str:
    """Returns the label of a method, as 'Tucker (8,16,16)'."""
    if isinstance(config, vt.TuckerConfig):
        return "Tucker ({},{},{})".format(*config.pre)
    if isinstance(config, vt.MLAConfig):
        return f"MLA ({config.q_lora_rank},{config.kv_lora_rank})"
    return f"GQA-{config.num_kv_heads}" if isinstance(config, vt.GQAConfig) else config.method.upper()


def peers(shape: Shape, rank: int) -> dict[str, Layer]:
    """Everything else: GQA and MLA of ours beside others', and Tucker Attention of this rank beside other factorised forms."""
    dim, heads = shape.dim, shape.heads
    found = {"dense (timm), fused_attn off": Layer(partial(unfused, dim, heads), vt.MHAConfig())}
    for kv_heads in (1, 2, 4):
        if heads % kv_heads == 0 and kv_heads < heads:
            found |= ours(shape, vt.GQAConfig(num_kv_heads=kv_heads))
            found[f"GQA-{kv_heads} (timm AttentionRope)"] = Layer(partial(attention_rope, dim, heads, kv_heads))
    for latent in (16, dim // heads, 2 * dim // heads):
        config = vt.MLAConfig(q_lora_rank=dim // 6, kv_lora_rank=latent)
        found |= ours(shape, config)
        found[f"{title(config)} (textbook)"] = Layer(partial(TextbookMLA, dim, heads, dim // 6, latent))
    same = tucker(shape, rank)
    weights = same.count_parameters(shape.spec).weights
    found[f"{title(same)} (einsums)"] = Layer(partial(einsums, same, shape.spec))
    for kind in ("tucker", "cp", "blocktt"):
        found[f"dense, {kind} Linears (tensorly-torch)"] = Layer(
            partial(FactorizedAttention, dim, heads, kind, weights)
        )
    return found


def einsums(config: vt.TuckerConfig, spec: vt.HostSpec) -> nn.Module:
    """The equations on a layer's weights."""
    return EinsumTucker(config.build(spec))


def built(config: vt.AttentionConfig, spec: vt.HostSpec) -> nn.Module:
    """A layer of ours with its options."""
    layer = config.build(spec)
    config.set_options(layer)
    return layer
