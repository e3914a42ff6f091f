"""Multi-head latent attention: queries, and keys with values, go through low-rank latents.

    Q_i = x WDQ WUQ_i,  K_i = x WDKV WUK_i,  V_i = x WDKV WUV_i
    parameters per layer: d^2 + 5 d c with one latent of width c for keys and values, d^2 + 6 d c with two
Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 (without the decoupled RoPE).
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vit_tucker.attention.base import DENSE_INIT_STD, HostSpec, MHAWeights, ParameterCount, PerHeadConfig, count_extras
from vit_tucker.attention.module import (
    PerHeadModule,
    head_bias,
    init_linear,
    join_heads,
    linear_bias,
    linear_weight,
    set_linear,
    split_heads,
)
from vit_tucker.attention.moments import Moments
from vit_tucker.attention.registry import register_method
from vit_tucker.errors import PatchError
from vit_tucker.tensor.metric import Root, metric_root
from vit_tucker.tensor.selector import basis_and_columns
from vit_tucker.tensor.tucker import Tucker, leading_eigenvectors


@register_method("mla")
class MLAConfig(PerHeadConfig):
    """Multi-head latent attention with a query latent and a key/value latent."""

    method: Literal["mla"] = "mla"

    q_lora_rank: int = Field(ge=1, description="Width of the query latent, at most embed_dim.")
    kv_lora_rank: int = Field(ge=1, description="Width of the key/value latent, at most embed_dim.")
    shared_kv: bool = Field(
        default=True, description="Keys and values share one latent; false gives each its own of that width."
    )

    def check(self, spec: HostSpec) -> None:
        """See base class."""
        self.refuse_extras(spec)
        for name, limit in zip(("q_lora_rank", "kv_lora_rank"), full_ranks(spec, self.shared_kv), strict=True):
            if getattr(self, name) > limit:
                raise PatchError(f"{name}={getattr(self, name)} is above its full rank {limit}")

    @classmethod
    def full_rank(cls, spec: HostSpec) -> "MLAConfig":
        """Latents as wide as the projections' ranks."""
        query, key_value = full_ranks(spec, shared_kv=True)
        return cls(q_lora_rank=query, kv_lora_rank=key_value)

    @classmethod
    def example(cls, spec: HostSpec) -> "MLAConfig":
        """Latents of an eighth of the width."""
        rank = max(1, spec.embed_dim // 8)
        return cls(q_lora_rank=rank, kv_lora_rank=rank)

    def build(self, spec: HostSpec, **factory: Any) -> "MLA":
        """See base class."""
        return MLA(spec, self, **factory)

    def count_parameters(self, spec: HostSpec) -> ParameterCount:
        """cQ (C + HD) + cKV (C + 2 HD) + HD O weights (d^2 + 5 d c, Table 1); two latents: cKV C more (d^2 + 6 d c)."""
        query = self.q_lora_rank * (spec.embed_dim + spec.attn_dim)
        latents = 1 if self.shared_kv else 2
        key_value = self.kv_lora_rank * (latents * spec.embed_dim + 2 * spec.attn_dim)
        key_bias = "qk_norm" in spec.extras
        biases = (2 + key_bias) * spec.attn_dim * spec.qkv_bias + spec.out_dim * spec.proj_bias
        return ParameterCount(query + key_value + spec.attn_dim * spec.out_dim, biases + count_extras(spec))


def full_ranks(spec: HostSpec, shared_kv: bool) -> tuple[int, int]:
    """The largest useful latents of queries and of keys and values."""
    key_value = spec.attn_dim * (2 if shared_kv else 1)
    return min(spec.embed_dim, spec.attn_dim), min(spec.embed_dim, key_value)


class MLA(PerHeadModule):
    """Multi-head latent self-attention, trained in its expanded form (queries and keys of width D)."""

    def __init__(self, spec: HostSpec, config: MLAConfig, **factory: Any) -> None:
        super().__init__(spec)
        self.num_kv_heads = spec.num_heads
        bias = spec.qkv_bias
        key_bias = bias and "qk_norm" in spec.extras  # a key bias cancels in the softmax unless a norm follows it
        self.q_down = nn.Linear(spec.embed_dim, config.q_lora_rank, bias=False, **factory)
        self.q_up = nn.Linear(config.q_lora_rank, spec.attn_dim, bias=bias, **factory)
        self.kv_down = nn.Linear(spec.embed_dim, config.kv_lora_rank, bias=False, **factory)
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

    def mix(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """See AttentionModule. x (B, N, C) -> (B, N, H*D)"""
        B, N, _ = x.shape
        latent = self.kv_down(x)  # (B, N, cKV)
        v_latent = latent if self.v_down is None else self.v_down(x)
        q = self.q_up(self.q_down(x)).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, N, D)
        k = self.k_up(latent).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        v = self.v_up(v_latent).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        return self.attend_heads(x, q, k, v, attn_mask, is_causal)

    def convert_from(self, weights: MHAWeights) -> None:
        """Joint SVD of [WK | WV] for a shared latent, SVD of WQ for the query latent; exact at full rank."""
        self._convert(weights, None, 0.0)

    def convert_calibrated(self, weights: MHAWeights, moments: Moments, damping: float) -> None:
        """The same SVDs, weighted by the tokens' covariance on one side and by the gradients of queries, keys and values on
        the other; query and value biases take up the tokens' mean."""
        self._convert(weights, moments, damping)

    def _convert(self, weights: MHAWeights, moments: Moments | None, damping: float) -> None:
        query, key, value = (join_heads(w) for w in (weights.query, weights.key, weights.value))  # (C, H*D)
        biases = (weights.query_bias, weights.key_bias, weights.value_bias)
        q_bias, k_bias, v_bias = (None if bias is None else bias.flatten() for bias in biases)
        width = query.shape[1]
        x_root = q_grad = kv_grad = None
        if moments is not None:
            x_root = metric_root(moments.token_covariance if q_bias is not None else moments.query[:-1, :-1], damping)
            q_grad, kv_grad = (metric_root(g, damping).root for g in (moments.query_grad, moments.kv_grad))
        q_down, q_up = latent(query, self.q_down.out_features, x_root, q_grad)
        rank = self.kv_down.out_features
        if self.v_down is None:
            k_down, kv_up = latent(torch.cat([key, value], -1), rank, x_root, kv_grad)
            v_down, k_up, v_up = k_down, kv_up[:, :width], kv_up[:, width:]
        else:
            k_grad = v_grad = None
            if moments is not None:
                k_grad = metric_root(moments.kv_grad[:width, :width], damping).root
                v_grad = metric_root(moments.kv_grad[width:, width:], damping).root
            k_down, k_up = latent(key, rank, x_root, k_grad)
            v_down, v_up = latent(value, rank, x_root, v_grad)
            set_linear(self.v_down, v_down)
        if moments is not None and q_bias is not None and v_bias is not None:
            q_bias = q_bias + moments.mean @ (query - q_down @ q_up)
            v_bias = v_bias + moments.mean @ (value - v_down @ v_up)
        set_linear(self.q_down, q_down)
        set_linear(self.kv_down, k_down)
        set_linear(self.q_up, q_up, q_bias)
        set_linear(self.k_up, k_up, k_bias)
        set_linear(self.v_up, v_up, v_bias)
        set_linear(self.proj, weights.out.flatten(0, 1), weights.out_bias)

    def input_projections(self) -> list[nn.Linear]:
        """See base class."""
        return [linear for linear in (self.q_down, self.kv_down, self.v_down) if linear is not None]

    def dense_weights(self) -> MHAWeights:
        """See base class."""
        latent = linear_weight(self.kv_down)
        v_latent = latent if self.v_down is None else linear_weight(self.v_down)
        return MHAWeights(
            query=split_heads(linear_weight(self.q_down) @ linear_weight(self.q_up), self.num_heads),
            key=split_heads(latent @ linear_weight(self.k_up), self.num_heads),
            value=split_heads(v_latent @ linear_weight(self.v_up), self.num_heads),
            out=linear_weight(self.proj).unflatten(0, (self.num_heads, -1)),
            query_bias=head_bias(self.q_up, self.num_heads),
            value_bias=head_bias(self.v_up, self.num_heads),
            out_bias=linear_bias(self.proj),
        )

    def tucker_form(self) -> tuple[Tucker, Tucker]:
        """See base class; Thm B.4: the bases are the down-projections, the core multiplies the up-projections.

        A query bias adds the coordinate 1 to the query latent.
        """
        weights = self.dense_weights()
        q_basis, q_up = linear_weight(self.q_down), split_heads(linear_weight(self.q_up), self.num_heads)  # (H, cQ, D)
        if weights.query_bias is not None:
            q_basis = torch.block_diag(q_basis, torch.ones(1, 1, dtype=q_basis.dtype, device=q_basis.device))
            q_up = torch.cat([q_up, weights.query_bias.unsqueeze(1)], 1)
        k_basis, k_up = linear_weight(self.kv_down), split_heads(linear_weight(self.k_up), self.num_heads)
        v_basis = k_basis if self.v_down is None else linear_weight(self.v_down)
        v_up = split_heads(linear_weight(self.v_up), self.num_heads)
        eye = torch.eye(self.num_heads, dtype=q_basis.dtype, device=q_basis.device)
        pre = Tucker(q_up @ k_up.mT, eye, q_basis, k_basis)
        if (
            q_basis.shape[1] > self.attn_dim
        ):  # more coordinates than the heads have columns: those are the smaller basis
            pairs = weights.pre_pairs()
            columns, selected = basis_and_columns(pairs.left)
            pre = Tucker(selected @ k_up.mT, eye, columns, k_basis)
        latent_outputs = v_up @ weights.out  # (H, cKV, O)
        if self.num_heads * v_up.shape[1] < min(weights.out.shape[2], self.attn_dim):
            out_basis, columns = basis_and_columns(latent_outputs.mT)
            return pre, Tucker(columns, eye, out_basis, v_basis)
        out_basis, columns = basis_and_columns(weights.out.mT)
        return pre, Tucker(columns @ v_up.mT, eye, out_basis, v_basis)


def latent(matrix: Tensor, rank: int, left: Root | None = None, right: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Best factors of a matrix, matrix ~ down @ up, by an SVD through the Gram; weighted if roots are given.

    Args:
        matrix: (C, K), float64.
        rank: width of the latent, R.
        left: root of the left metric (C, C), or None.
        right: root of the right metric (K, K), or None.

    Returns:
        down (C, R) and up (R, K), with the least ||left (matrix - down up) right||_F.
    """
    whitened = matrix if left is None else left.root @ matrix
    weighted = whitened if right is None else whitened @ right
    basis = leading_eigenvectors(weighted @ weighted.mT, rank)
    return basis if left is None else left.inverse @ basis, basis.mT @ whitened
