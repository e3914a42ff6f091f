"""Multi-head attention: the dense baseline, parameter for parameter timm's Attention.

out = sum_i softmax(Q_i K_i^T / sqrt(D)) V_i WO_i + b,   parameters per layer: 4 d^2
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vit_tucker.attention.base import ParameterCount, PerHeadConfig
from vit_tucker.attention.heads import PerHeadModule
from vit_tucker.attention.host import DENSE_INIT_STD, HostSpec, MHAWeights, count_extras
from vit_tucker.attention.linear import (
    head_bias,
    init_linear,
    join_heads,
    linear_bias,
    linear_weight,
    set_linear,
    split_heads,
)
from vit_tucker.attention.moments import Moments, Needs
from vit_tucker.attention.registry import register_method
from vit_tucker.show import methods
from vit_tucker.show.methods import MethodDisplay


@register_method("mha")
class MHAConfig(PerHeadConfig):
    """Multi-head attention with the host's shape: for baselines, and to train dense attention from a new start."""

    display: ClassVar[MethodDisplay] = methods.MHA

    method: Literal["mha"] = "mha"

    def check(self, spec: HostSpec) -> None:
        """Accepts any host: MHA has no options that could be out of range."""

    @classmethod
    def full_rank(cls, spec: HostSpec) -> "MHAConfig":
        """Returns the only config there is."""
        return cls()

    @classmethod
    def example(cls, spec: HostSpec) -> "MHAConfig":
        """Returns the only config there is."""
        return cls()

    def build(self, spec: HostSpec, **factory: Any) -> "MHA":
        """Returns the layer with its own random initialisation."""
        return MHA(spec, **factory)

    def count_parameters(self, spec: HostSpec) -> ParameterCount:
        """Counts 3 C HD + HD O weights (4 d^2, Table 1)."""
        weights = spec.attn_dim * (3 * spec.embed_dim + spec.out_dim)
        biases = (2 + spec.key_bias) * spec.attn_dim * spec.qkv_bias + spec.out_dim * spec.proj_bias
        return ParameterCount(weights, biases + count_extras(spec))


class MHA(PerHeadModule):
    """Multi-head self-attention. Its state dict is that of timm's Attention, of EvaAttention where keys have no bias."""

    q_bias: nn.Parameter | None
    v_bias: nn.Parameter | None

    def __init__(self, spec: HostSpec, **factory: Any) -> None:
        super().__init__(spec)
        self.num_kv_heads = spec.num_heads
        self.qkv = nn.Linear(spec.embed_dim, 3 * spec.attn_dim, bias=spec.has_key_bias, **factory)
        without_key = spec.qkv_bias and not spec.key_bias
        for name in ("q_bias", "v_bias"):
            setattr(self, name, nn.Parameter(torch.empty(spec.attn_dim, **factory)) if without_key else None)
        self.add_extras(spec, **factory)
        self.proj = nn.Linear(spec.attn_dim, spec.out_dim, bias=spec.proj_bias, **factory)
        self.init_weights()

    def init_weights(self) -> None:
        """Draws normal weights with timm's standard deviation."""
        for linear in (self.qkv, self.proj):
            init_linear(linear, DENSE_INIT_STD)
        for bias in (self.q_bias, self.v_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def project(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values of all heads, (B, H, N, D) each, of tokens (B, N, C)."""
        B, N, _ = x.shape
        qkv = self.qkv(x)
        if self.q_bias is not None and self.v_bias is not None:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = qkv.reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)  # (3, B, H, N, D)
        q, k, v = qkv.unbind(0)
        return self.rotate_heads(q, k, v, rope)

    def convert_from(self, weights: MHAWeights) -> None:
        """Copies the weights, with zeros for biases that have none."""
        qkv = torch.cat([join_heads(w) for w in (weights.query, weights.key, weights.value)], -1)
        given = (weights.query_bias, weights.key_bias, weights.value_bias)
        biases = [qkv.new_zeros(self.attn_dim) if bias is None else bias.flatten() for bias in given]
        if self.q_bias is not None and self.v_bias is not None:
            self.q_bias.copy_(biases[0])
            self.v_bias.copy_(biases[2])
        set_linear(self.qkv, qkv, torch.cat(biases))
        set_linear(self.proj, weights.out.flatten(0, 1), weights.out_bias)

    @property
    def needs(self) -> Needs:
        """Returns that no key, value or gradient moments are read."""
        return Needs("none", "none", gradients=False, rotations=False)

    def convert_calibrated(self, weights: MHAWeights, moments: Moments, damping: float) -> None:
        """Copies the weights: the conversion is exact whatever the tokens are."""
        self.convert_from(weights)

    def input_projections(self) -> list[nn.Linear]:
        """Returns the joint projection of queries, keys and values."""
        return [self.qkv]

    def dense_weights(self) -> MHAWeights:
        """Returns the weights of all H heads."""
        query, key, value = (split_heads(w, self.num_heads) for w in linear_weight(self.qkv).chunk(3, -1))
        biases = head_bias(self.qkv, 3 * self.num_heads)
        query_bias, key_bias, value_bias = (None, None, None) if biases is None else biases.chunk(3)
        if self.q_bias is not None and self.v_bias is not None:
            query_bias, value_bias = (
                bias.detach().double().unflatten(0, (self.num_heads, -1)) for bias in (self.q_bias, self.v_bias)
            )
        out = linear_weight(self.proj).unflatten(0, (self.num_heads, -1))
        return MHAWeights(query, key, value, out, query_bias, key_bias, value_bias, linear_bias(self.proj))
