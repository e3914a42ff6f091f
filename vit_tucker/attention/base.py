"""What an attention method is: the host's description, the canonical weights and the config base.

Letters, used in every shape comment of the package:
B batch, N tokens, C embed_dim, O output width (C in nearly every host), H heads, G key/value heads, D head_dim, R rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from typing_extensions import Self

from vit_tucker.attention.attend import attend_flops
from vit_tucker.attention.backends import AUTO, get_backend, is_whole, list_backends
from vit_tucker.attention.options import Calibration, RankRule, Rule, Selection
from vit_tucker.attention.rope import RopeSpec, adjacent_pairs, pair_columns
from vit_tucker.errors import ConfigError, PatchError
from vit_tucker.tensor.rotary import RotaryPairs
from vit_tucker.tensor.tucker import Pairs
from vit_tucker.validation import Checked

if TYPE_CHECKING:
    from vit_tucker.attention.module import AttentionModule

DENSE_INIT_STD = 0.02
"""Standard deviation of timm's ViT initialisation (trunc_normal_, std=.02) of each dense projection."""
CALL_FEATURES = frozenset({"position_bias", "layout"})
"""What ``AttentionModule.forward`` takes care of, for methods that implement ``mix`` and ``readout``."""
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
    layout: Literal["sequence", "grid", "channels_first"] = "sequence"
    extras: Mapping[str, Mapping[str, nn.Module]] = field(default_factory=dict)

    @property
    def attn_dim(self) -> int:
        """H * D, width of all heads together."""
        return self.num_heads * self.head_dim

    @property
    def scale(self) -> float:
        """1 / sqrt(D): the softmax scale of the host, which every method keeps."""
        return self.head_dim**-0.5

    @property
    def has_key_bias(self) -> bool:
        """Keys have a bias. It cancels in the softmax unless a norm or a rotation follows it."""
        return self.qkv_bias and self.key_bias

    @property
    def rotates_latent(self) -> bool:
        """Methods with a latent key rotate it; norms of each head's key come before its own rotation and forbid that."""
        return self.rope is not None and "qk_norm" not in self.extras

    @property
    def latent_key_bias(self) -> bool:
        """A key bias that does not cancel: rotations of the latent key make it depend on the position."""
        return self.has_key_bias and self.rotates_latent

    @property
    def features(self) -> tuple[str, ...]:
        """What the host does beyond plain attention on (B, N, C): names in ``REASONS``."""
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

    def double(self) -> MHAWeights:
        """The same in float64, detached: conversions are computed so."""
        tensors = {name: value for name, value in vars(self).items() if value is not None}
        return MHAWeights(**{name: value.detach().double() for name, value in tensors.items()})

    def pre_pairs(self) -> Pairs:
        """Pre-softmax tensor stack_i [WQ_i; bQ_i] WK_i^T: modes head, query (C, or C + 1 with a query bias), key (C).

        The query bias is one more row of the query mode, since it does not cancel in the softmax; the key bias does.
        """
        query = self.query
        if self.query_bias is not None:
            query = torch.cat([query, self.query_bias.unsqueeze(1)], 1)
        return Pairs(query, self.key)

    def pre_tensor(self, rope: RopeSpec | None) -> Pairs | RotaryPairs:
        """The pre-softmax tensor with its rotations, if there are any."""
        return self.pre_pairs() if rope is None else self.rotary_pairs(rope)

    def rotary_pairs(self, rope: RopeSpec) -> RotaryPairs:
        """The pre-softmax tensor of a host with RoPE: with a row for the key bias, which rotations keep from cancelling."""
        query, key = self.query, self.key
        if self.query_bias is not None:
            query = torch.cat([query, self.query_bias.unsqueeze(1)], 1)
        if self.key_bias is not None:
            key = torch.cat([key, self.key_bias.unsqueeze(1)], 1)
        heads, _, width = key.shape
        columns = pair_columns(rope, heads, width).to(key.device)
        return RotaryPairs(adjacent_pairs(query, rope.half), adjacent_pairs(key, rope.half), columns)

    def post_pairs(self) -> Pairs:
        """Post-softmax tensor stack_i (WV_i WO_i)^T: modes head, output (O), value (C) (Eq 5 of the paper)."""
        return Pairs(self.out.mT, self.value)

    def folded_out_bias(self) -> Tensor | None:
        """Output bias with the value biases in it, b_O + sum_i bV_i WO_i, exact since softmax rows sum to 1. (O,)"""
        if self.value_bias is None:
            return self.out_bias
        folded = torch.einsum("hd,hdo->o", self.value_bias, self.out)
        return folded if self.out_bias is None else folded + self.out_bias


class ParameterCount(NamedTuple):
    """Parameters of one attention layer: the paper's tables count weights only.

    Attributes:
        weights: entries of projections, cores and factors.
        biases: entries of biases, and of the host's norms and gates that the method carries.
    """

    weights: int
    biases: int

    @property
    def total(self) -> int:
        """Weights and biases."""
        return self.weights + self.biases


class AttentionConfig(Checked):
    """Base of all method configs: where the method goes, how it starts, and what a method must be able to do.

    A new method derives from this class, is decorated with ``@register_method("name")`` and sets
    ``method: Literal["name"] = "name"``.
    """

    carries: ClassVar[frozenset[str]] = frozenset()
    """Features of the host (``HostSpec.features``) that the method keeps; it refuses hosts with others."""

    whole_kernels: ClassVar[bool] = False
    """Backends that compute Tucker Attention as a whole can be asked for."""

    latent_rope: ClassVar[bool] = False
    """On hosts with RoPE one latent key rotates for all heads, instead of each head's own."""

    method: str
    init: Literal["pretrained", "random"] = Field(
        default="pretrained",
        description="Start from the host's weights (converted), or from the method's own initialisation.",
    )
    layers: Selection | None = Field(
        default=None,
        description="Which attention modules: full names with wildcards, 're:' patterns, indices, '0-5'. All if null.",
    )
    exclude: Selection | None = Field(
        default=None, description="Attention modules to leave alone, written as in layers."
    )
    rules: tuple[Rule, ...] = Field(
        default=(), description="Other options for some layers, in order: the last match wins."
    )

    calibration: Calibration | None = Field(
        default=None,
        description="Convert the pretrained weights for the tokens of some training images; null: by weights alone.",
    )
    backend: str = Field(
        default=AUTO,
        json_schema_extra={"enum": [AUTO, *list_backends()]},
        description="What computes the attention; auto chooses by device and precision. Any other takes every call or fails.",
    )

    @field_validator("backend")
    @classmethod
    def _known_backend(cls, name: str) -> str:
        """A registered backend, and one that computes this method."""
        if is_whole(name) and not cls.whole_kernels:
            able = [AUTO, *(other for other in list_backends() if not is_whole(other))]
            raise ConfigError(f"backend '{name}' computes Tucker Attention as a whole; here: {', '.join(able)}")
        if name != AUTO:
            get_backend(name)
        return name

    def settle(self, module: AttentionModule) -> None:
        """Give a built module the options that all modules of ours have."""
        module.backend = self.backend
        if self.backend != AUTO:  # said here, so it counts more than what the host did
            module.fused_attn = self.backend != "eager"

    @property
    def rank_rule(self) -> RankRule | None:
        """The rule by which the ranks are yet to be chosen; None where they are given."""
        return None

    def without_choices(self) -> Self:
        """The config as its author wrote it: without the ranks that rank rules chose."""
        return self.model_copy(update={"rules": tuple(rule for rule in self.rules if rule.chosen_by is None)})

    def unconverted(self) -> Self:
        """The same layers from their own initialisation: for structures, and for weights that come from elsewhere."""
        return self.model_copy(update={"init": "random", "calibration": None})

    @abstractmethod
    def check(self, spec: HostSpec) -> None:
        """Raise PatchError with the reason if the method with these options can't replace such a host."""

    @abstractmethod
    def build(self, spec: HostSpec, **factory: Any) -> AttentionModule:
        """The module with the method's own random initialisation; ``factory``: device, dtype."""

    @abstractmethod
    def count_parameters(self, spec: HostSpec) -> ParameterCount:
        """Parameters of the built module, from the formula alone."""

    @abstractmethod
    def count_flops(self, spec: HostSpec, num_tokens: int) -> int:
        """Floating point operations (2 per multiply-add) of the matrix products for one image of N tokens."""

    @classmethod
    @abstractmethod
    def full_rank(cls, spec: HostSpec) -> Self:
        """The config whose conversion of such a host is exact. The contract tests hold every method to it."""

    @classmethod
    @abstractmethod
    def example(cls, spec: HostSpec) -> Self:
        """A config that compresses such a host (or is as small as the method gets): for tests, benchmarks and docs."""

    def refuse_features(self, spec: HostSpec) -> None:
        """Raise PatchError for a feature of the host that the method can't carry."""
        for feature in spec.features:
            if feature not in self.carries:
                reason = REASONS.get(feature, "unknown").format(method=self.method)
                raise PatchError(f"{self.method} can't carry the host's {feature}: {reason}")


class PerHeadConfig(AttentionConfig):
    """Base of methods that form each head's query, key and output of width D: they carry all features of the host."""

    carries: ClassVar[frozenset[str]] = CALL_FEATURES | {"rope", "qk_norm", "scale_norm", "gate"}

    def count_flops(self, spec: HostSpec, num_tokens: int) -> int:
        """See base class: each weight multiplies each token once, then the attention itself, then the host's gate."""
        projections = 2 * num_tokens * self.count_parameters(spec).weights
        gate = 2 * num_tokens * spec.embed_dim * spec.attn_dim if "gate" in spec.extras else 0
        return projections + attend_flops(spec.num_heads, num_tokens, spec.head_dim, spec.head_dim) + gate


def count_extras(spec: HostSpec) -> int:
    """Parameters of the host's norms and gate."""
    return sum(p.numel() for group in spec.extras.values() for module in group.values() for p in module.parameters())
