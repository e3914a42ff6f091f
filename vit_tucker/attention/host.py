"""Shape and options of the attention layer that a method replaces, and its weights in canonical form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from vit_tucker.attention.rope import RopeSpec, adjacent_pairs, head_rotations
from vit_tucker.tensor.rotary import RotaryPairs
from vit_tucker.tensor.tucker import Pairs

DENSE_INIT_STD = 0.02
"""Standard deviation of timm's ViT initialisation (trunc_normal_, std=.02) of each dense projection."""


CALL_FEATURES = frozenset({"position_bias", "layout"})
"""Features that ``AttentionModule.forward`` handles, for methods that implement ``mix`` and ``readout``."""


REASONS = {
    "qk_norm": "its heads' queries and keys are normalised, and {method} never forms them",
    "scale_norm": "the heads' outputs pass a norm before the output projection, which {method} merges with the values",
    "gate": "the heads' outputs pass a gate before the output projection, which {method} merges with the values",
    "rope": "its queries and keys are rotated (RoPE)",
    "position_bias": "its scores have a relative position bias",
    "layout": "its tokens don't come as (B, N, C)",
}
"""Why a method may be unable to carry a feature of the host."""


@dataclass(frozen=True)
class HostSpec:
    """Shape and options of the attention layer that a method replaces; weights apart.

    Attributes:
        embed_dim: C, width of the tokens.
        num_heads: H.
        head_dim: D; H * D is C unless the host says otherwise.
        out_dim: O, width of the output.
        qkv_bias: query, key and value projections have a bias.
        key_bias: False if of these only queries and values have one (BEiT, EVA).
        num_kv_heads: key/value heads of the host, None for H.
        proj_bias: the output projection has a bias.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.
        fused_attn: the host runs on scaled_dot_product_attention.
        rope: how queries and keys are rotated, None if they are not.
        softmax_scale: factor on the scores, None for 1 / sqrt(D).
        causal: self-attention of a decoder: tokens attend to earlier ones, whose keys and values a cache may hold.
        layout: of the tokens, "sequence" (..., N, C), "grid" (B, ..., C) or "channels_first" (B, C, ...).
        extras: modules of the host beyond the four projections, by feature name: "qk_norm" (q_norm, k_norm), "scale_norm"
            (norm), "gate" (gate), "position_bias" (position_bias). Methods that can't carry a feature refuse the host.
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    out_dim: int
    qkv_bias: bool = True
    key_bias: bool = True
    num_kv_heads: int | None = None
    proj_bias: bool = True
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    fused_attn: bool = True
    rope: RopeSpec | None = None
    softmax_scale: float | None = None
    causal: bool = False
    layout: Literal["sequence", "grid", "channels_first"] = "sequence"
    extras: Mapping[str, Mapping[str, nn.Module]] = field(default_factory=dict)

    @property
    def attn_dim(self) -> int:
        """Returns H * D, the width of all heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Returns G * D, the width of all key heads together; H * D where heads rotate a key that they share each by its own."""
        heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        mixed = self.rope is not None and self.rope.per_head
        return self.attn_dim if mixed else heads * self.head_dim

    @property
    def scale(self) -> float:
        """Returns the softmax scale of the host, which every method keeps: 1 / sqrt(D) unless the host says otherwise."""
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def has_key_bias(self) -> bool:
        """Returns whether keys have a bias.

        It cancels in the softmax unless a norm or a rotation follows it.
        """
        return self.qkv_bias and self.key_bias

    @property
    def rotates_latent(self) -> bool:
        """Returns whether methods with a latent key rotate it.

        Norms of each head's key come before its own rotation and forbid that.
        """
        return self.rope is not None and "qk_norm" not in self.extras

    @property
    def latent_key_bias(self) -> bool:
        """Returns whether there is a key bias that does not cancel.

        Rotations of the latent key make it depend on the position.
        """
        return self.has_key_bias and self.rotates_latent

    @property
    def features(self) -> tuple[str, ...]:
        """Returns what the host does beyond plain attention on (B, N, C): names in ``REASONS``."""
        rope = ("rope",) if self.rope is not None else ()
        return (*rope, *(("layout",) if self.layout != "sequence" else ()), *self.extras)


@dataclass(frozen=True)
class MHAWeights:
    """Canonical weights of multi-head attention, per head, as used in ``x @ W`` (torch's Linear holds the transpose).

    Attributes:
        query, key, value: (H, C, D).
        out: (H, D, O).
        query_bias, key_bias, value_bias: (H, D) or None.
        out_bias: (O,) or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    out_bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> MHAWeights:
        """Returns the same in another precision, detached.

        Args:
            dtype: of the result.
        """
        given = {name: value for name, value in vars(self).items() if value is not None}
        return MHAWeights(**{name: value.detach().to(dtype) for name, value in given.items()})

    def double(self) -> MHAWeights:
        """Returns the same in float64, detached: conversions are computed so."""
        return self.to(torch.float64)

    def pre_pairs(self) -> Pairs:
        """Returns the pre-softmax tensor stack_i [WQ_i; bQ_i] WK_i^T: modes head, query (C, or C + 1 with a query bias), key (C).

        The query bias is one more row of the query mode, since it does not cancel in the softmax; the key bias does.
        """
        query = self.query
        if self.query_bias is not None:
            query = torch.cat([query, self.query_bias.unsqueeze(1)], 1)
        return Pairs(query, self.key)

    def pre_tensor(self, rope: RopeSpec | None) -> Pairs | RotaryPairs:
        """Returns the pre-softmax tensor with its rotations, if there are any.

        Args:
            rope: rotations of the host, None without RoPE.
        """
        return self.pre_pairs() if rope is None else self.rotary_pairs(rope)

    def rotary_pairs(self, rope: RopeSpec) -> RotaryPairs:
        """Returns the pre-softmax tensor of a host with RoPE, with a row for the key bias, which does not cancel there.

        Args:
            rope: rotations of the host.
        """
        query, key = self.pre_pairs()
        if self.key_bias is not None:
            key = torch.cat([key, self.key_bias.unsqueeze(1)], 1)
        heads, _, width = key.shape
        rotations = head_rotations(rope, heads, width).to(key.device)
        return RotaryPairs(adjacent_pairs(query, rope.half), adjacent_pairs(key, rope.half), rotations)

    def post_pairs(self) -> Pairs:
        """Returns the post-softmax tensor stack_i (WV_i WO_i)^T: modes head, output (O), value (C) (Eq 5 of the paper)."""
        return Pairs(self.out.mT, self.value)

    def folded_out_bias(self) -> Tensor | None:
        """Returns the output bias b_O + sum_i bV_i WO_i, (O,): value biases in it are exact, since softmax rows sum to 1."""
        if self.value_bias is None:
            return self.out_bias
        folded = torch.einsum("hd,hdo->o", self.value_bias, self.out)
        return folded if self.out_bias is None else folded + self.out_bias


def count_extras(spec: HostSpec) -> int:
    """Returns the number of parameters of the host's norms and gate."""
    return sum(p.numel() for group in spec.extras.values() for module in group.values() for p in module.parameters())
