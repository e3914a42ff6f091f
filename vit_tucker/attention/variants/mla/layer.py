"""The layer of multi-head latent attention, see ``vit_tucker.attention.variants.mla.config``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_tucker.attention.backends.heads import expand_heads
from vit_tucker.attention.backends.masks import for_blind_rows, zero_blind_rows
from vit_tucker.attention.call import Call
from vit_tucker.attention.contraction import is_plain, joint_linear, open_shape
from vit_tucker.attention.heads import PerHeadModule
from vit_tucker.attention.host import CALL_FEATURES, DENSE_INIT_STD, HostSpec, MHAWeights
from vit_tucker.attention.latent_rope import resize_keys
from vit_tucker.attention.linear import (
    augmented_weight,
    head_bias,
    init_linear,
    linear_bias,
    linear_weight,
    resize_linear,
    set_linear,
    split_heads,
)
from vit_tucker.attention.moments import Moments
from vit_tucker.attention.rope import rotate_latent, spread_columns
from vit_tucker.attention.variants.mla.conversion import Latents, MLATarget, fit_latents
from vit_tucker.attention.variants.mla.ranks import refuse_ranks
from vit_tucker.tensor.rotary import RotaryPairs
from vit_tucker.tensor.selector import basis_and_columns
from vit_tucker.tensor.tucker import Tucker


def can_absorb(spec: HostSpec) -> bool:
    """Nothing comes between the projections and the attention, or the attention and the output's projection: these can be one."""
    return all(feature in CALL_FEATURES for feature in spec.extras)


def absorbing_saves(spec: HostSpec, q_lora_rank: int, kv_lora_rank: int, images: int, num_tokens: int) -> bool:
    """Whether heads attend in the latent at less cost, their up projections folded (absorption).

    Per head and token the absorbed form has products of cKV (cQ + O + 2 N) multiply-adds, the expanded one of
    D (cQ + O + 2 N + 2 cKV); folding costs D cKV (cQ + O) per head once. Where latents rotate, both forms attend in the latent:
    then N plays no part.

    Args:
        spec: of the host.
        q_lora_rank, kv_lora_rank: cQ, cKV.
        images: of the batch.
        num_tokens: N, of an image.
    """
    width, rest = spec.head_dim, q_lora_rank + spec.out_dim
    keys = 0 if spec.rotates_latent else 2 * num_tokens
    saved = (width - kv_lora_rank) * (rest + keys) + 2 * kv_lora_rank * width
    return images * num_tokens * saved > width * kv_lora_rank * rest


def has_head_key_bias(spec: HostSpec) -> bool:
    """Each head's key has a bias: it cancels in the softmax unless a norm follows it."""
    return spec.has_key_bias and "qk_norm" in spec.extras


class MLA(PerHeadModule):
    """Multi-head latent self-attention, expanded (queries and keys of width D) or absorbed, whichever costs less; with RoPE
    absorbed. Then the buffer pair_rotations (cKV/2,) says by which column of the host's table each latent pair rotates.
    """

    pair_rotations: Tensor | None

    def __init__(
        self, spec: HostSpec, q_lora_rank: int, kv_lora_rank: int, *, shared_kv: bool = True, **factory: Any
    ) -> None:
        super().__init__(spec)
        self.num_kv_heads = spec.num_heads
        bias = spec.qkv_bias
        key_bias = has_head_key_bias(spec)
        self.q_down = nn.Linear(spec.embed_dim, q_lora_rank, bias=False, **factory)
        self.q_up = nn.Linear(q_lora_rank, spec.attn_dim, bias=bias, **factory)
        self.kv_down = nn.Linear(spec.embed_dim, kv_lora_rank, bias=spec.latent_key_bias, **factory)
        columns = None
        if spec.rotates_latent:
            columns = torch.empty(kv_lora_rank // 2, dtype=torch.int64, device=factory.get("device"))
        self.register_buffer("pair_rotations", columns)
        self.v_down = None
        if not shared_kv:
            self.v_down = nn.Linear(spec.embed_dim, kv_lora_rank, bias=False, **factory)
        self.k_up = nn.Linear(kv_lora_rank, spec.attn_dim, bias=key_bias, **factory)
        self.v_up = nn.Linear(kv_lora_rank, spec.attn_dim, bias=bias, **factory)
        self.can_absorb = can_absorb(spec)
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

    def run(self, call: Call) -> Tensor:
        """See AttentionModule: in absorbed form where that costs less."""
        ups = (self.q_up, self.k_up, self.v_up, self.proj)
        if self.absorbs(call.x) and is_plain(*self.input_projections(), *ups):
            return self.run_absorbed(call)
        return super().run(call)

    def absorbs(self, x: Tensor) -> bool:
        """Whether these tokens attend in the latent, see ``absorbing_saves``; open numbers of tokens count as large."""
        if not self.can_absorb:
            return False
        q_lora_rank, kv_lora_rank = self.q_down.out_features, self.kv_down.out_features
        if open_shape(x):
            return kv_lora_rank <= self.head_dim
        return absorbing_saves(self.spec, q_lora_rank, kv_lora_rank, *x.shape[:2])

    def run_absorbed(self, call: Call) -> Tensor:
        """The layer without heads' keys and values: queries' and output's projection take in WUK_i, WUV_i. -> (B, N, O)"""
        B, N, _ = call.x.shape
        heads = self.num_heads
        latents = joint_linear(call.x, self.input_projections())
        k, v = latents[1].unsqueeze(1), latents[-1].unsqueeze(1)
        k_up = by_heads(self.k_up.weight, heads).mT  # (H, cKV, D)
        weight = (k_up @ by_heads(self.q_up.weight, heads)).flatten(0, 1)  # WUK_i WUQ_i^T, (H*cKV, cQ)
        bias = None if self.q_up.bias is None else (k_up @ by_heads(self.q_up.bias, heads).unsqueeze(2)).flatten()
        # flat: torch adds a bias within a product of a slice only where its rows are one dimension
        q = F.linear(latents[0].flatten(0, 1), weight, bias).reshape(B, N, heads, -1).transpose(1, 2)  # (B, H, N, cKV)
        if self.pair_rotations is not None and self.spec.rope is not None:
            q, k = rotate_latent(q, k, call.rope, self.pair_rotations, self.spec.rope)
        y = self.attend(q, k, v, call.attn_mask, call.is_causal).transpose(1, 2).flatten(2)  # (B, N, H*cKV)
        v_up, out = by_heads(self.v_up.weight, heads).mT, by_heads(self.proj.weight.mT, heads)  # (H, cKV, D), (H, D, O)
        weight = (v_up @ out).flatten(0, 1)  # WUV_i WO_i, (H*cKV, O)
        if self.v_up.bias is None:
            return F.linear(y, weight.mT, self.proj.bias)
        bias = F.linear(self.v_up.bias, self.proj.weight, self.proj.bias)  # weights of the softmax sum to 1, or to 0
        y = F.linear(y, weight.mT, bias)
        if call.attn_mask is None or not call.may_be_blind:
            return y
        each = (by_heads(self.v_up.bias, heads).unsqueeze(1) @ out).squeeze(1)  # bUV_i WO_i, (H, O)
        return y - for_blind_rows(call.attn_mask, call.is_causal, each, B, N)

    def mix(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Tensor | None = None
    ) -> Tensor:
        """See AttentionModule. x (B, N, C) -> (B, N, H*D)"""
        B, N, _ = x.shape
        latents = joint_linear(x, self.input_projections())
        # flat, (B*N, ...): torch adds a bias within a product of a slice only where its rows are one dimension
        q, latent, v_latent = (latents[i].flatten(0, 1) for i in (0, 1, -1))
        q = self.q_up(q).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, N, D)
        if self.pair_rotations is not None:
            return self.finish(x, self.attend_latent(q, latents[1], latents[-1], attn_mask, is_causal, rope))
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
        plain = is_plain(self.k_up, self.v_up)
        q = q @ by_heads(self.k_up.weight if plain else called_weight(self.k_up, q), self.num_heads)  # Q_i WUK_i^T
        q, key = rotate_latent(q, k.unsqueeze(1), rope, self.pair_rotations, self.spec.rope)  # (B, H, N, cKV)
        if not plain:
            values = self.v_up(v).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # (B, H, N, D)
            key = expand_heads(key, self.num_heads)
            return self.attend(q, key, values, attn_mask, is_causal).transpose(1, 2).flatten(2)
        y = self.attend(q, key, v.unsqueeze(1), attn_mask, is_causal)  # (B, H, N, cKV)
        y = y @ self.v_up.weight.unflatten(0, (self.num_heads, -1)).mT  # (B, H, N, D)
        if self.v_up.bias is not None:
            y = y + by_heads(self.v_up.bias, self.num_heads).unsqueeze(1)
            y = y if attn_mask is None else zero_blind_rows(y, attn_mask, is_causal)
        return y.transpose(1, 2).flatten(2)  # (B, N, H*D)

    def convert_from(self, weights: MHAWeights) -> None:
        """Joint SVD of [WK | WV] for a shared latent, SVD of WQ for the query latent; exact at full rank."""
        self._take_over(weights, fit_latents(weights, self._target()))

    def convert_calibrated(self, weights: MHAWeights, moments: Moments, damping: float) -> None:
        """The same SVDs, weighted by the tokens' covariance on one side and by the gradients of queries, keys and values on
        the other; query and value biases take up the tokens' mean."""
        self._take_over(weights, fit_latents(weights, self._target(), moments, damping))

    def _target(self) -> MLATarget:
        rope = None if self.pair_rotations is None else self.spec.rope
        return MLATarget(self.q_down.out_features, self.kv_down.out_features, self.v_down is None, rope)

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

    def rank_options(self) -> dict[str, Any]:
        """See base class."""
        return {"q_lora_rank": self.q_down.out_features, "kv_lora_rank": self.kv_down.out_features}

    def _resize(self, **options: Any) -> None:
        """See base class: each product of a down and an up projection as by its SVD, keys and values of one latent together."""
        q_lora_rank, kv_lora_rank = options["q_lora_rank"], options["kv_lora_rank"]
        refuse_ranks(self.spec, q_lora_rank, kv_lora_rank, self.v_down is None)
        self._resize_latent(self.q_down, [self.q_up], q_lora_rank)
        if self.v_down is None:
            self._resize_latent(self.kv_down, [self.k_up, self.v_up], kv_lora_rank)
        else:
            self._resize_latent(self.v_down, [self.v_up], kv_lora_rank)
            self._resize_latent(self.kv_down, [self.k_up], kv_lora_rank)

    def _resize_latent(self, down: nn.Linear, ups: list[nn.Linear], rank: int) -> None:
        if rank == down.out_features:
            return
        width, rotations = down.in_features, self.pair_rotations if down is self.kv_down else None
        factor, rests = augmented_weight(down), [linear_weight(up) for up in ups]
        joined = torch.cat(rests, 1)  # (r, columns of all)
        (factor, mixing), rotations = resize_keys(factor, joined @ joined.mT, rank, rotations, self.spec)
        assert mixing is not None
        biases = [linear_bias(up) for up in ups]
        resize_linear(down, width, rank)
        set_linear(down, factor[:width], factor[width] if len(factor) > width else None)
        for up, rest, bias in zip(ups, rests, biases, strict=True):
            resize_linear(up, rank, up.out_features)
            set_linear(up, mixing @ rest, bias)
        if down is self.kv_down:
            self.pair_rotations = rotations

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
        latent_bias = linear_bias(self.kv_down)
        if self.v_down is None and latent_bias is not None and value_bias is not None:
            shift = latent_bias @ linear_weight(self.v_up)
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


def called_weight(linear: nn.Module, like: Tensor) -> Tensor:
    """The weight (out, in) of a Linear that is more than its weight, got by calling it: once, on the identity."""
    width: int = linear.in_features  # type: ignore[assignment]
    identity = torch.eye(width, dtype=like.dtype, device=like.device)
    rows = linear(torch.cat([identity.new_zeros(1, width), identity]))
    return (rows[1:] - rows[:1]).mT


def by_heads(x: Tensor, heads: int) -> Tensor:
    """(H*D, ...) -> (H, D, ...)"""
    return x.unflatten(0, (heads, -1))
