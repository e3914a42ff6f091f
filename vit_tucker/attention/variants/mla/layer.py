"""The layer of multi-head latent attention, see ``vit_tucker.attention.variants.mla.config``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_tucker.attention.backends import heads, masks
from vit_tucker.attention.call import Call
from vit_tucker.attention.contraction import is_plain, open_shape
from vit_tucker.attention.heads import PerHeadModule
from vit_tucker.attention.host import DENSE_INIT_STD, HostSpec, MHAWeights
from vit_tucker.attention.latent_layer import LatentModule
from vit_tucker.attention.latent_rope import resize_keys
from vit_tucker.attention.linear import (
    augmented_weight,
    by_heads,
    head_bias,
    head_weight,
    init_linear,
    linear_bias,
    linear_weight,
    orthonormalise_down,
    resize_linear,
    set_augmented,
    set_linear,
    split_heads,
    weight_of,
)
from vit_tucker.attention.moments import Moments, Needs
from vit_tucker.attention.variants.mla.conversion import Latents, MLATarget, fit_latents, tucker_of_latents
from vit_tucker.attention.variants.mla.ranks import absorbing_saves, can_absorb, has_head_key_bias, refuse_ranks
from vit_tucker.tensor.rotary import RotaryPairs
from vit_tucker.tensor.tucker import Tucker


class MLA(LatentModule, PerHeadModule):
    """Multi-head latent self-attention, expanded (queries and keys of width D) or absorbed, whichever costs less.

    With RoPE it is absorbed.
    """

    def __init__(
        self, spec: HostSpec, q_lora_rank: int, kv_lora_rank: int, *, shared_kv: bool = True, **factory: Any
    ) -> None:
        super().__init__(spec)
        self.num_kv_heads = spec.num_heads
        self.q_down = nn.Linear(spec.embed_dim, q_lora_rank, bias=False, **factory)
        self.q_up = nn.Linear(q_lora_rank, spec.attn_dim, bias=spec.qkv_bias, **factory)
        self.kv_down = nn.Linear(spec.embed_dim, kv_lora_rank, bias=spec.latent_key_bias, **factory)
        self.add_rotations(spec, kv_lora_rank, **factory)
        self.v_down = None if shared_kv else nn.Linear(spec.embed_dim, kv_lora_rank, bias=False, **factory)
        self.k_up = nn.Linear(kv_lora_rank, spec.attn_dim, bias=has_head_key_bias(spec), **factory)
        self.v_up = nn.Linear(kv_lora_rank, spec.attn_dim, bias=spec.qkv_bias, **factory)
        self.can_absorb = can_absorb(spec)
        self.add_extras(spec, **factory)
        self.proj = nn.Linear(spec.attn_dim, spec.out_dim, bias=spec.proj_bias, **factory)
        self.init_weights()

    def init_weights(self) -> None:
        """Draws normal weights, so that each product of a down and an up projection has timm's standard deviation."""
        for down, up in ((self.q_down, self.q_up), (self.kv_down, self.k_up), (self.v_down, self.v_up)):
            std = (DENSE_INIT_STD / up.in_features**0.5) ** 0.5
            if down is not None:
                init_linear(down, std)
            init_linear(up, std)
        init_linear(self.proj, DENSE_INIT_STD)
        self.init_rotations()

    def run(self, call: Call) -> Tensor:
        """Computes the layer in absorbed form where that costs less."""
        ups = (self.q_up, self.k_up, self.v_up, self.proj)
        if self.absorbs(call.x) and is_plain(*self.input_projections(), *ups):
            return self.run_absorbed(call)
        return super().run(call)

    def absorbs(self, x: Tensor) -> bool:
        """Returns whether tokens ``x`` (B, N, C) attend in the latent, see ``absorbing_saves``; open numbers count as large."""
        if not self.can_absorb or open_shape(x):
            return self.can_absorb and self.kv_down.out_features <= self.head_dim
        return absorbing_saves(self.spec, self.q_down.out_features, self.kv_down.out_features, *x.shape[:2])

    def run_absorbed(self, call: Call) -> Tensor:
        """Computes (B, N, O) without heads' keys and values: queries' and output's projection contain WUK_i, WUV_i."""
        (B, N, _), H = call.x.shape, self.num_heads
        latent, k, v = self.latents(call.x)
        k_up = by_heads(self.k_up.weight, H).mT  # (H, cKV, D)
        weight = (k_up @ by_heads(self.q_up.weight, H)).flatten(0, 1)  # WUK_i WUQ_i^T, (H*cKV, cQ)
        bias = None if self.q_up.bias is None else (k_up @ by_heads(self.q_up.bias, H).unsqueeze(2)).flatten()
        q = F.linear(latent.flatten(0, 1), weight, bias).reshape(B, N, H, -1).transpose(1, 2)  # (B, H, N, cKV)
        q, k = self.rotate_latent(q, k.unsqueeze(1), call.rope)
        y = self.attend(q, k, v.unsqueeze(1), call.attn_mask, call.is_causal).transpose(1, 2).flatten(2)
        v_up, out = by_heads(self.v_up.weight, H).mT, by_heads(self.proj.weight.mT, H)  # (H, cKV, D), (H, D, O)
        weight = (v_up @ out).flatten(0, 1)  # WUV_i WO_i, (H*cKV, O)
        if self.v_up.bias is None:
            return F.linear(y, weight.mT, self.proj.bias)
        bias = F.linear(self.v_up.bias, self.proj.weight, self.proj.bias)  # weights of the softmax sum to 1, or to 0
        y = F.linear(y, weight.mT, bias)
        if call.attn_mask is None or not call.may_be_blind:
            return y
        each = (by_heads(self.v_up.bias, H).unsqueeze(1) @ out).squeeze(1)  # bUV_i WO_i, (H, O)
        return y - masks.for_blind_rows(call.attn_mask, call.is_causal, each, B, N)

    def orthonormalise(self) -> None:
        """Rewrites the down projections with orthonormal columns; columns of latent keys that rotate in pairs get unit length."""
        for down, ups in self._latents():
            orthonormalise_down(down, *ups, pairs=down is self.kv_down and self.pair_rotations is not None)

    def _latents(self) -> list[tuple[nn.Linear, list[nn.Linear]]]:
        """Returns each down projection with those that read its latent."""
        key = (self.kv_down, [self.k_up, self.v_up] if self.v_down is None else [self.k_up])
        return [(self.q_down, [self.q_up]), key, *([] if self.v_down is None else [(self.v_down, [self.v_up])])]

    @property
    def averages_latent(self) -> bool:
        """Returns whether heads average latents: they rotate, without adapters on what expands them, or a cache holds them."""
        return self.spec.causal or (self.pair_rotations is not None and is_plain(self.k_up, self.v_up))

    def project(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values of tokens (B, N, C): of all heads, or in the latent, which all heads share."""
        B, N, _ = x.shape
        latents = self.latents(x)
        # flat, (B*N, ...): torch adds a bias within a product of a slice only where its rows are one dimension
        q, latent, v_latent = (part.flatten(0, 1) for part in latents)
        q = self.q_up(q).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, N, D)
        if self.pair_rotations is None and not self.spec.causal:
            k = self.k_up(latent).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)
            v = self.v_up(v_latent).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)
            return self.rotate_heads(q, k, v, rope)
        q = q @ by_heads(weight_of(self.k_up, q), self.num_heads)  # Q_i WUK_i^T
        q, key = self.rotate_latent(q, latents[1].unsqueeze(1), rope)  # (B, H, N, cKV)
        if self.averages_latent:
            return q, key, key if self.values_are_keys else latents[2].unsqueeze(1)
        values = self.v_up(latents[2]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N, D)
        return q, heads.expand_heads(key, self.num_heads), values

    def expand_values(self, y: Tensor) -> Tensor:
        """Returns the heads' averaged values (B, H, N, D) of averaged latents y (B, H, N, cKV)."""
        y = y @ by_heads(weight_of(self.v_up, y), self.num_heads).mT
        return y if self.v_up.bias is None else y + by_heads(self.v_up.bias, self.num_heads).unsqueeze(1)

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the heads' outputs side by side, (B, N, H*D), see ``PerHeadModule.combine``; y as ``project`` has values."""
        return super().combine(x, self.expand_values(y) if self.averages_latent else y)

    def mix(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Tensor | None = None
    ) -> Tensor:
        """Returns the heads' outputs side by side, (B, N, H*D), of tokens (B, N, C)."""
        y = self.attend(*self.project(x, rope), attn_mask, is_causal)
        if not self.averages_latent or self.v_up.bias is None or attn_mask is None:
            return self.combine(x, y)
        return super().combine(x, masks.zero_blind_rows(self.expand_values(y), attn_mask, is_causal))

    def convert_from(self, weights: MHAWeights) -> None:
        """Converts by the SVD of [WK | WV] for a shared latent and that of WQ for the query latent; exact at full rank."""
        self._set(weights, fit_latents(weights, self._target()))

    @property
    def needs(self) -> Needs:
        """Returns the moments read: gradients, and with latent RoPE the mean key metric."""
        return Needs("mean" if self.spec.rotates_latent else "none", "none")

    def convert_calibrated(self, weights: MHAWeights, moments: Moments, damping: float) -> None:
        """Runs the SVDs of ``fit_latents`` weighted by moments."""
        self._set(weights, fit_latents(weights, self._target(), moments, damping))

    def _target(self) -> MLATarget:
        rope = None if self.pair_rotations is None else self.spec.rope
        return MLATarget(self.q_down.out_features, self.kv_down.out_features, self.v_down is None, rope)

    def _set(self, weights: MHAWeights, latents: Latents) -> None:
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
        """Returns the present widths of the latents."""
        return {"q_lora_rank": self.q_down.out_features, "kv_lora_rank": self.kv_down.out_features}

    def _resize(self, **options: Any) -> None:
        """Resizes each product of a down and an up projection as by its SVD, keys and values of one latent together."""
        refuse_ranks(self.spec, options["q_lora_rank"], options["kv_lora_rank"], self.v_down is None)
        for down, ups in self._latents():
            self._resize_latent(down, ups, options["q_lora_rank" if down is self.q_down else "kv_lora_rank"])

    def _resize_latent(self, down: nn.Linear, ups: list[nn.Linear], rank: int) -> None:
        if rank == down.out_features:
            return
        rotations, rests = self.pair_rotations if down is self.kv_down else None, [linear_weight(up) for up in ups]
        joined = torch.cat(rests, 1)  # (r, columns of all)
        (factor, mixing), rotations = resize_keys(
            augmented_weight(down), joined @ joined.mT, rank, rotations, self.spec
        )
        assert mixing is not None
        resize_linear(down, down.in_features, rank)
        set_augmented(down, factor)
        for up, rest in zip(ups, rests, strict=True):
            bias = linear_bias(up)
            resize_linear(up, rank, up.out_features)
            set_linear(up, mixing @ rest, bias)
        if down is self.kv_down:
            self.pair_rotations = rotations

    @property
    def latent_projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear | None]:
        """Returns the down projections of queries, keys and values."""
        return self.q_down, self.kv_down, self.v_down

    def dense_weights(self) -> MHAWeights:
        """Returns the weights of all H heads."""
        latent, v_latent = linear_weight(self.kv_down), linear_weight(self.value_projection)
        value_bias, latent_bias = head_bias(self.v_up, self.num_heads), linear_bias(self.kv_down)
        if self.v_down is None and latent_bias is not None and value_bias is not None:
            value_bias = value_bias + split_heads(latent_bias @ linear_weight(self.v_up), self.num_heads)
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

    def rotary_pairs(self) -> RotaryPairs:
        """Returns pairs of width cKV: left Q_i WUK_i^T, right WDKV."""
        if self.pair_rotations is None:
            return super().rotary_pairs()
        left = self.pre_pairs().left @ head_weight(self.k_up, self.num_heads).mT
        return self.shared_rotary_pairs(left, augmented_weight(self.kv_down))

    def tucker_form(self) -> tuple[Tucker, Tucker]:
        """Returns the down projections as bases, the products of the up projections as cores, see ``tucker_of_latents``."""
        k_basis, v_basis = self.latent_bases()
        q_up, k_up, v_up = (head_weight(up, self.num_heads) for up in (self.q_up, self.k_up, self.v_up))
        bases = linear_weight(self.q_down), k_basis, v_basis
        return tucker_of_latents(self.dense_weights(), bases, (q_up, k_up, v_up))
