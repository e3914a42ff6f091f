"""Grouped-query attention: groups of heads share a key and a value head; one group is multi-query attention (MQA).

    parameters per layer: 2 d^2 + 2 G D d
Source: Ainslie et al., GQA, arXiv 2305.13245; Shazeer, arXiv 1911.02150 (MQA).
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vit_tucker.attention.base import ParameterCount, PerHeadConfig
from vit_tucker.attention.heads import PerHeadModule
from vit_tucker.attention.host import CALL_FEATURES, DENSE_INIT_STD, HostSpec, MHAWeights, count_extras
from vit_tucker.attention.linear import (
    head_bias,
    head_weight,
    init_linear,
    join_heads,
    linear_bias,
    linear_weight,
    set_linear,
)
from vit_tucker.attention.moments import Form, Moments, Needs
from vit_tucker.attention.options import Rank
from vit_tucker.attention.registry import register_method
from vit_tucker.attention.rope import RopeSpec, separate_pairs
from vit_tucker.errors import PatchError
from vit_tucker.show import methods
from vit_tucker.show.methods import MethodDisplay
from vit_tucker.tensor.metric import metric_root
from vit_tucker.tensor.resize import orthonormal
from vit_tucker.tensor.rotary import RotaryPairs, best_pair_each
from vit_tucker.tensor.tucker import Pairs, gram_right, leading_eigenvectors
from vit_tucker.tensor.weighted import head_weights, mean_metric


@register_method("gqa")
class GQAConfig(PerHeadConfig):
    """Grouped-query attention with ``num_kv_heads`` key/value heads (1: multi-query attention)."""

    display: ClassVar[MethodDisplay] = methods.GQA

    method: Literal["gqa"] = "gqa"

    num_kv_heads: Rank = Field(description="Number of key/value heads; divides the host's num_heads. 1 is MQA.")
    conversion: Literal["mean", "svd"] = Field(
        default="mean",
        description="From pretrained heads: mean-pool each group's keys and values (the GQA paper), or the best rank-D basis "
        "of each group's weight tensors.",
    )

    def check(self, spec: HostSpec) -> None:
        """Raises PatchError unless the groups divide the heads, and for norms of heads with conversion='svd'."""
        if spec.num_heads % self.num_kv_heads:
            divisors = [g for g in range(1, spec.num_heads + 1) if spec.num_heads % g == 0]
            raise PatchError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={spec.num_heads}: one of {divisors}"
            )
        fixed = [feature for feature in spec.extras if feature not in CALL_FEATURES]
        if self.conversion == "svd" and fixed:
            raise PatchError(
                f"conversion='svd' changes the head bases, so it can't keep {', '.join(fixed)}; use 'mean'"
            )

    @classmethod
    def full_rank(cls, spec: HostSpec) -> "GQAConfig":
        """Returns the config with as many key/value heads as the host."""
        return cls(num_kv_heads=spec.num_kv_heads or spec.num_heads)

    @classmethod
    def example(cls, spec: HostSpec) -> "GQAConfig":
        """Returns a config of multi-query attention."""
        return cls(num_kv_heads=1)

    def build(self, spec: HostSpec, **factory: Any) -> "GQA":
        """Returns the layer with its own random initialisation."""
        return GQA(spec, self, **factory)

    def count_parameters(self, spec: HostSpec) -> ParameterCount:
        """Counts C HD + 2 C GD + HD O weights (2 d^2 + 2 G D d, Table 1)."""
        kv_dim = self.num_kv_heads * spec.head_dim
        weights = spec.embed_dim * (spec.attn_dim + 2 * kv_dim) + spec.attn_dim * spec.out_dim
        biases = (spec.attn_dim + (1 + spec.key_bias) * kv_dim) * spec.qkv_bias + spec.out_dim * has_proj_bias(
            spec, self
        )
        return ParameterCount(weights, biases + count_extras(spec))


def has_proj_bias(spec: HostSpec, config: GQAConfig) -> bool:
    """Returns whether the layer has an output bias: the SVD conversion folds value biases into it."""
    return spec.proj_bias or (config.conversion == "svd" and spec.qkv_bias)


class GQA(PerHeadModule):
    """Grouped-query self-attention. Parameter names follow timm's AttentionRope with unfused projections."""

    def __init__(self, spec: HostSpec, config: GQAConfig, **factory: Any) -> None:
        super().__init__(spec)
        self.num_kv_heads = config.num_kv_heads
        self.conversion = config.conversion
        kv_dim = config.num_kv_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.embed_dim, spec.attn_dim, bias=spec.qkv_bias, **factory)
        self.k_proj = nn.Linear(spec.embed_dim, kv_dim, bias=spec.has_key_bias, **factory)
        self.v_proj = nn.Linear(spec.embed_dim, kv_dim, bias=spec.qkv_bias, **factory)
        self.add_extras(spec, **factory)
        self.proj = nn.Linear(spec.attn_dim, spec.out_dim, bias=has_proj_bias(spec, config), **factory)
        self.init_weights()

    def init_weights(self) -> None:
        """Draws normal weights with timm's standard deviation."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.proj):
            init_linear(linear, DENSE_INIT_STD)

    def project(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries (B, H, N, D), keys and values (B, G, N, D) of tokens (B, N, C)."""
        B, N, _ = x.shape
        q = self.q_proj(x).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, N, D)
        k = self.k_proj(x).reshape(B, N, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, G, N, D)
        v = self.v_proj(x).reshape(B, N, self.num_kv_heads, self.head_dim).transpose(1, 2)
        return self.rotate_heads(q, k, v, rope)

    def convert_from(self, weights: MHAWeights) -> None:
        """Converts exactly where num_kv_heads is num_heads; else to each group's mean, or its best basis."""
        if self.conversion == "mean":
            self._set(mean_pool_groups(weights, self.num_kv_heads))
        else:
            self._set(svd_groups(weights, self.num_kv_heads, self.spec.rope))

    def convert_calibrated(self, weights: MHAWeights, moments: Moments, damping: float) -> None:
        """Finds the best bases on the tokens with conversion='svd'; means stay means, and only the read-out is fitted."""
        if self.conversion == "mean":
            self.convert_from(weights)
        else:
            self._set(svd_groups(weights, self.num_kv_heads, self.spec.rope, moments, damping))

    @property
    def needs(self) -> Needs:
        """Returns the moments read: keys and values of each head with conversion='svd'; none of them for means."""
        form: Form = "heads" if self.conversion == "svd" else "none"
        return Needs(form, form, gradients=False, rotations=False)

    def input_projections(self) -> list[nn.Linear]:
        """Returns the projections of queries, keys and values."""
        return [self.q_proj, self.k_proj, self.v_proj]

    def _set(self, converted: MHAWeights) -> None:
        for linear, weight, bias in (
            (self.q_proj, converted.query, converted.query_bias),
            (self.k_proj, converted.key, converted.key_bias),
            (self.v_proj, converted.value, converted.value_bias),
        ):
            set_linear(linear, join_heads(weight), None if bias is None else bias.flatten())
        set_linear(self.proj, converted.out.flatten(0, 1), converted.out_bias)

    def dense_weights(self) -> MHAWeights:
        """Returns the weights of all H heads; heads of a group share keys and values."""
        group = self.num_heads // self.num_kv_heads
        return MHAWeights(
            query=head_weight(self.q_proj, self.num_heads),
            key=head_weight(self.k_proj, self.num_kv_heads).repeat_interleave(group, 0),
            value=head_weight(self.v_proj, self.num_kv_heads).repeat_interleave(group, 0),
            out=linear_weight(self.proj).unflatten(0, (self.num_heads, -1)),
            query_bias=head_bias(self.q_proj, self.num_heads),
            key_bias=head_bias(self.k_proj, self.num_kv_heads, group),
            value_bias=head_bias(self.v_proj, self.num_kv_heads, group),
            out_bias=linear_bias(self.proj),
        )


def mean_pool_groups(weights: MHAWeights, num_kv_heads: int) -> MHAWeights:
    """Returns H heads with the G means of each group's keys and values (section 2.1 of the GQA paper); G divides H."""
    given = {name: getattr(weights, name) for name in ("key", "value", "key_bias", "value_bias")}
    pooled = {name: x.unflatten(0, (num_kv_heads, -1)).mean(1) for name, x in given.items() if x is not None}
    return replace(weights, **pooled)


def svd_groups(
    weights: MHAWeights,
    num_kv_heads: int,
    rope: RopeSpec | None = None,
    moments: Moments | None = None,
    damping: float = 0.0,
) -> MHAWeights:
    """Finds the best rank-D key and value basis of each group's weight tensors; queries and outputs absorb the change of basis.

    For a group with heads i, the key basis U (C, D) minimises sum_i ||WQ_i WK_i^T (I - U U^T)||^2, so that the new key is x U
    and the new query weight WQ_i (WK_i^T U); values likewise with WO_i. With moments the norms are those of the error on the
    tokens. Key biases vanish in the softmax, value biases are folded into the output bias, exactly. With RoPE each pair of the
    new key is the best one for that pair of all heads, up to complex factors, which rotations leave alone.

    Args:
        weights: H heads.
        num_kv_heads: G, divides H.
        rope: of the host.
        moments: of the layer's tokens; None for the error in the weights.
        damping: of the moments.

    Returns:
        The same attention with key and value of G heads; exact for G = H.
    """
    pre, post = weights.pre_tensor(rope), weights.post_pairs()
    rows = pre.left.shape[1]
    left_query = left_out = key_metrics = value_metrics = None
    if moments is not None:
        left_query, left_out = (metric_root(m, damping).root for m in (moments.query[:rows, :rows], moments.output))
        key_metrics, value_metrics = moments.given("key"), moments.given("value")
    keys, change_key = group_bases(pre, num_kv_heads, left_query, key_metrics, damping)
    values, change_value = group_bases(post, num_kv_heads, left_out, value_metrics, damping)
    query, width = pre.left @ change_key, weights.query.shape[1]
    if rope is not None:
        query, keys = separate_pairs(query, rope.half), separate_pairs(keys, rope.half)
    return MHAWeights(
        query=query[:, :width],
        key=keys[:, :width],
        value=values,
        out=change_value.mT @ weights.out,
        query_bias=None if weights.query_bias is None else query[:, width],
        key_bias=None if rope is None or weights.key_bias is None else keys[:, width],
        out_bias=weights.folded_out_bias(),
    )


def group_bases(
    tensor: Pairs | RotaryPairs, groups: int, left_root: Tensor | None, metrics: Tensor | None, damping: float
) -> tuple[Tensor, Tensor]:
    """Returns a basis of the right mode of each group of heads, (G, J, D), and changes (H, D, D) with W_i ~ A_i change_i basis^T.

    Args:
        tensor: A_i B_i^T, left (H, I, D), right (H, J, D), with rotations or without.
        groups: G.
        left_root, metrics: root of the left metric (I, I) and right metrics (H, J, J), or None.
        damping: of the right metrics.
    """
    bases, changes, rows = [], [], tensor.right.shape[1]
    for part in torch.arange(len(tensor.left), device=tensor.left.device).chunk(groups):
        left, right, root = tensor.left[part], tensor.right[part], None
        if left_root is not None and metrics is not None:
            metric = metrics[part, :rows, :rows]
            root = metric_root(mean_metric(metric), damping)
            left, right = left_root @ left * head_weights(metric)[:, None, None], root.root @ right
        if isinstance(tensor, RotaryPairs):
            basis, change = best_pair_each(RotaryPairs(left, right, tensor.rotations[part]))
        else:
            basis = leading_eigenvectors(gram_right(Pairs(left, right)), right.shape[-1])
            change = right.mT @ basis
        if root is not None:  # from coordinates of unit variance back to orthonormal columns
            basis, triangle = orthonormal(root.inverse @ basis, isinstance(tensor, RotaryPairs))
            change = change if triangle is None else change @ triangle.mT
        bases.append(basis)
        changes.append(change)
    return torch.stack(bases), torch.cat(changes)
