"""Multi-head latent attention: queries, and keys with values, go through low-rank latents.

    Q_i = x WDQ WUQ_i,  K_i = x WDKV WUK_i,  V_i = x WDKV WUV_i
    parameters per layer: d^2 + 5 d c with one latent of width c for keys and values, d^2 + 6 d c with two

For hosts with RoPE the latent key itself is rotated (latent RoPE; no decoupled RoPE): Q_i WUK_i^T meets x WDKV, both rotated, so
that a query is still one matrix times a token. All heads then share the latent as key and value. Where norms of the heads' keys
come before the rotation there is no such form; then each head's key is rotated, as in the host.
Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; latent RoPE: Tucker Attention, arXiv 2603.30033, Eqs 13-14.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vit_tucker.attention.base import DENSE_INIT_STD, HostSpec, MHAWeights, ParameterCount, PerHeadConfig, count_extras
from vit_tucker.attention.heads import PerHeadModule
from vit_tucker.attention.linear import (
    augmented_weight,
    head_bias,
    init_linear,
    linear_bias,
    linear_weight,
    set_linear,
    split_heads,
)
from vit_tucker.attention.mla_conversion import Latents, Target, decompose
from vit_tucker.attention.moments import Moments
from vit_tucker.attention.ranks import even_rank, refuse_odd
from vit_tucker.attention.registry import register_method
from vit_tucker.attention.rope import rotate_latent, spread_columns
from vit_tucker.attention.sdpa import attend_flops
from vit_tucker.errors import PatchError
from vit_tucker.tensor.rotary import RotaryPairs
from vit_tucker.tensor.selector import basis_and_columns
from vit_tucker.tensor.tucker import Tucker


@register_method("mla")
class MLAConfig(PerHeadConfig):
    """Multi-head latent attention with a query latent and a key/value latent."""

    latent_rope: ClassVar[bool] = True

    method: Literal["mla"] = "mla"

    q_lora_rank: int = Field(ge=1, description="Width of the query latent, at most embed_dim.")
    kv_lora_rank: int = Field(ge=1, description="Width of the key/value latent, at most embed_dim.")
    shared_kv: bool = Field(
        default=True, description="Keys and values share one latent; false gives each its own of that width."
    )

    def check(self, spec: HostSpec) -> None:
        """See base class."""
        refuse_odd(spec, "kv_lora_rank", self.kv_lora_rank)
        for name, limit in zip(("q_lora_rank", "kv_lora_rank"), full_ranks(spec, self.shared_kv), strict=True):
            if getattr(self, name) > limit:
                raise PatchError(f"{name}={getattr(self, name)} is above its full rank {limit}")

    @classmethod
    def full_rank(cls, spec: HostSpec) -> "MLAConfig":
        """Latents as wide as the projections' ranks."""
        shared = not spec.rotates_latent
        query, key_value = full_ranks(spec, shared)
        return cls(q_lora_rank=query, kv_lora_rank=key_value, shared_kv=shared)

    @classmethod
    def example(cls, spec: HostSpec) -> "MLAConfig":
        """Latents of an eighth of the width."""
        rank = max(1, spec.embed_dim // 8)
        return cls(q_lora_rank=rank, kv_lora_rank=even_rank(rank) if spec.rotates_latent else rank)

    def build(self, spec: HostSpec, **factory: Any) -> "MLA":
        """See base class."""
        return MLA(spec, self, **factory)

    def count_parameters(self, spec: HostSpec) -> ParameterCount:
        """cQ (C + HD) + cKV (C + 2 HD) + HD O weights (d^2 + 5 d c, Table 1); two latents: cKV C more (d^2 + 6 d c)."""
        query = self.q_lora_rank * (spec.embed_dim + spec.attn_dim)
        latents = 1 if self.shared_kv else 2
        key_value = self.kv_lora_rank * (latents * spec.embed_dim + 2 * spec.attn_dim)
        key_bias = spec.attn_dim * has_head_key_bias(spec) + self.kv_lora_rank * spec.latent_key_bias
        biases = 2 * spec.attn_dim * spec.qkv_bias + key_bias + spec.out_dim * spec.proj_bias
        return ParameterCount(query + key_value + spec.attn_dim * spec.out_dim, biases + count_extras(spec))

    def count_flops(self, spec: HostSpec, num_tokens: int) -> int:
        """See base class. With RoPE queries and outputs of width cKV, instead of the heads' keys and values."""
        flops = super().count_flops(spec, num_tokens)
        if not spec.rotates_latent:
            return flops
        heads, width = spec.num_heads, spec.head_dim
        expanded = attend_flops(heads, num_tokens, width, width)
        return flops - expanded + attend_flops(heads, num_tokens, self.kv_lora_rank, self.kv_lora_rank)


def full_ranks(spec: HostSpec, shared_kv: bool) -> tuple[int, int]:
    """The largest useful latents of queries and of keys and values; rotated keys need H*D columns."""
    key_value = spec.attn_dim * (2 if shared_kv else 1)
    return min(spec.embed_dim, spec.attn_dim), key_value if spec.rotates_latent else min(spec.embed_dim, key_value)


def has_head_key_bias(spec: HostSpec) -> bool:
    """Each head's key has a bias: it cancels in the softmax unless a norm follows it."""
    return spec.has_key_bias and "qk_norm" in spec.extras


class MLA(PerHeadModule):
    """Multi-head latent self-attention, trained in its expanded form (queries and keys of width D), with RoPE in its absorbed
    form. Then the buffer pair_rotations (cKV/2,) says by which column of the host's table each latent pair rotates.
    """

    pair_rotations: Tensor | None

    def __init__(self, spec: HostSpec, config: MLAConfig, **factory: Any) -> None:
        super().__init__(spec)
        self.num_kv_heads = spec.num_heads
        bias = spec.qkv_bias
        key_bias = has_head_key_bias(spec)
        self.q_down = nn.Linear(spec.embed_dim, config.q_lora_rank, bias=False, **factory)
        self.q_up = nn.Linear(config.q_lora_rank, spec.attn_dim, bias=bias, **factory)
        self.kv_down = nn.Linear(spec.embed_dim, config.kv_lora_rank, bias=spec.latent_key_bias, **factory)
        columns = None
        if spec.rotates_latent:
            columns = torch.empty(config.kv_lora_rank // 2, dtype=torch.int64, device=factory.get("device"))
        self.register_buffer("pair_rotations", columns)
        self.v_down = None
        if not config.shared_kv:
            self.v_down = nn.Linear(spec.embed_dim, config.kv_lora_rank, bias=False, **factory)
        self.k_up = nn.Linear(config.kv_lora_rank, spec.attn_dim, bias=key_bias, **factory)
        self.v_up = nn.Linear(config.kv_lora_rank, spec.attn_dim, bias=bias, **factory)
        self.add_extras(spec, **factory)
        self.proj = nn.Linear(spec.attn_dim, spec.out_dim, bias=spec.proj_bias, **factory)
        self.init_weights()

    def init_weights(self) -> None:
        """Normal; each product of a down and an up projection has timm's standard deviation, split evenly between them."""
        for down, up in ((self.q_down, self.q_up), (self.kv_down, self.k_up), (self.v_down, self.v_up)):
            std = (DENSE_INIT_STD / up.in_features**0.5) ** 0.5
            if down is not None:
                init_linear(down, std)
            init_linear(up, std)
        init_linear(self.proj, DENSE_INIT_STD)
        if self.pair_rotations is not None:
            self.pair_rotations.copy_(spread_columns(self.kv_down.out_features, self.num_heads, self.head_dim))

    def mix(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Tensor | None = None
    ) -> Tensor:
        """See AttentionModule. x (B, N, C) -> (B, N, H*D)"""
        B, N, _ = x.shape
        latent = self.kv_down(x)  # (B, N, cKV)
        v_latent = latent if self.v_down is None else self.v_down(x)
        q = self.q_up(self.q_down(x)).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, N, D)
        if self.pair_rotations is not None:
            return self.finish(x, self.attend_latent(q, latent, v_latent, attn_mask, is_causal, rope))
        k = self.k_up(latent).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        v = self.v_up(v_latent).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        return self.attend_heads(x, q, k, v, attn_mask, is_causal, rope)

    def attend_latent(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, rope: Tensor | None
    ) -> Tensor:
        """Attention in the latent space, where keys are rotated.

        Args:
            q: (B, H, N, D).
            k, v: latents of keys and values, (B, N, cKV).
            attn_mask, is_causal, rope: as for the layer.

        Returns:
            The heads' outputs, (B, N, H*D).
        """
        assert self.spec.rope is not None
        assert self.pair_rotations is not None
        q = q @ self.k_up.weight.unflatten(0, (self.num_heads, -1))  # Q_i WUK_i^T, (B, H, N, cKV)
        q, key = rotate_latent(q, k.unsqueeze(1), rope, self.pair_rotations, self.spec.rope)
        y = self.attend(q, key, v.unsqueeze(1), attn_mask, is_causal)  # (B, H, N, cKV)
        y = (y @ self.v_up.weight.unflatten(0, (self.num_heads, -1)).mT).transpose(1, 2).flatten(2)  # (B, N, H*D)
        return y if self.v_up.bias is None else y + self.v_up.bias

    def convert_from(self, weights: MHAWeights) -> None:
        """Joint SVD of [WK | WV] for a shared latent, SVD of WQ for the query latent; exact at full rank."""
        self._take_over(weights, decompose(weights, self._target()))

    def convert_calibrated(self, weights: MHAWeights, moments: Moments, damping: float) -> None:
        """The same SVDs, weighted by the tokens' covariance on one side and by the gradients of queries, keys and values on
        the other; query and value biases take up the tokens' mean."""
        self._take_over(weights, decompose(weights, self._target(), moments, damping))

    def _target(self) -> Target:
        rope = None if self.pair_rotations is None else self.spec.rope
        return Target(self.q_down.out_features, self.kv_down.out_features, self.v_down is None, rope)

    def _take_over(self, weights: MHAWeights, latents: Latents) -> None:
        parts = latents.key_value
        set_linear(self.q_down, latents.q_down)
        set_linear(self.q_up, latents.q_up, latents.q_bias)
        set_linear(self.kv_down, parts.k_down, parts.down_bias)
        if self.v_down is not None:
            set_linear(self.v_down, parts.v_down)
        set_linear(self.k_up, parts.k_up, parts.k_bias)
        set_linear(self.v_up, parts.v_up, latents.v_bias)
        set_linear(self.proj, weights.out.flatten(0, 1), weights.out_bias)
        if self.pair_rotations is not None and parts.rotations is not None:
            self.pair_rotations.copy_(parts.rotations)

    @property
    def kv_width(self) -> int | None:
        """See base class. The latent, cKV, or both latents."""
        return self.kv_down.out_features + (0 if self.v_down is None else self.v_down.out_features)

    def input_projections(self) -> list[nn.Linear]:
        """See base class."""
        return [linear for linear in (self.q_down, self.kv_down, self.v_down) if linear is not None]

    def dense_weights(self) -> MHAWeights:
        """See base class."""
        latent = linear_weight(self.kv_down)
        v_latent = latent if self.v_down is None else linear_weight(self.v_down)
        value_bias = head_bias(self.v_up, self.num_heads)
        if self.v_down is None and self.kv_down.bias is not None and value_bias is not None:
            shift = self.kv_down.bias.detach().double() @ linear_weight(self.v_up)
            value_bias = value_bias + split_heads(shift, self.num_heads)
        return MHAWeights(
            query=split_heads(linear_weight(self.q_down) @ linear_weight(self.q_up), self.num_heads),
            key=split_heads(latent @ linear_weight(self.k_up), self.num_heads),
            value=split_heads(v_latent @ linear_weight(self.v_up), self.num_heads),
            out=linear_weight(self.proj).unflatten(0, (self.num_heads, -1)),
            query_bias=head_bias(self.q_up, self.num_heads),
            key_bias=head_bias(self.k_up, self.num_heads),
            value_bias=value_bias,
            out_bias=linear_bias(self.proj),
        )

    def latent_columns(self) -> Tensor:
        """See base class."""
        return super().latent_columns() if self.pair_rotations is None else self.pair_rotations

    def rotary_pairs(self) -> RotaryPairs:
        """See base class; pairs of width cKV: left Q_i WUK_i^T, right WDKV."""
        if self.pair_rotations is None:
            return super().rotary_pairs()
        weights, k_up = self.dense_weights(), split_heads(linear_weight(self.k_up), self.num_heads)  # (H, cKV, D)
        query, key = weights.query, linear_weight(self.kv_down)
        if weights.query_bias is not None:
            query = torch.cat([query, weights.query_bias.unsqueeze(1)], 1)
        bias = linear_bias(self.kv_down)
        if bias is not None:
            key = torch.cat([key, bias.unsqueeze(0)])
        columns = self.pair_rotations.expand(self.num_heads, -1)
        return RotaryPairs(query @ k_up.mT, key.expand(self.num_heads, -1, -1), columns)

    def tucker_form(self) -> tuple[Tucker, Tucker]:
        """See base class; Thm B.4: the bases are the down-projections, the core multiplies the up-projections.

        A query bias adds the coordinate 1 to the query latent.
        """
        weights = self.dense_weights()
        q_basis, q_up = linear_weight(self.q_down), split_heads(linear_weight(self.q_up), self.num_heads)  # (H, cQ, D)
        if weights.query_bias is not None:
            q_basis = torch.block_diag(q_basis, torch.ones(1, 1, dtype=q_basis.dtype, device=q_basis.device))
            q_up = torch.cat([q_up, weights.query_bias.unsqueeze(1)], 1)
        k_basis, k_up = augmented_weight(self.kv_down), split_heads(linear_weight(self.k_up), self.num_heads)
        v_basis = linear_weight(self.kv_down if self.v_down is None else self.v_down)
        if self.v_down is None and self.kv_down.bias is None:
            k_basis = v_basis  # the very same tensor
        v_up = split_heads(linear_weight(self.v_up), self.num_heads)
        eye = torch.eye(self.num_heads, dtype=q_basis.dtype, device=q_basis.device)
        pre = Tucker(q_up @ k_up.mT, eye, q_basis, k_basis)
        if (
            q_basis.shape[1] > self.attn_dim
        ):  # more coordinates than the heads have columns: those are the smaller basis
            columns, selected = basis_and_columns(weights.pre_pairs().left)
            pre = Tucker(selected @ k_up.mT, eye, columns, k_basis)
        latent_outputs = v_up @ weights.out  # (H, cKV, O)
        if self.num_heads * v_up.shape[1] < min(weights.out.shape[2], self.attn_dim):
            out_basis, columns = basis_and_columns(latent_outputs.mT)
            return pre, Tucker(columns, eye, out_basis, v_basis)
        out_basis, columns = basis_and_columns(weights.out.mT)
        return pre, Tucker(columns @ v_up.mT, eye, out_basis, v_basis)
