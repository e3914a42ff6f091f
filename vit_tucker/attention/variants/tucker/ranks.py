"""Ranks of Tucker layers: what they cost, and rules that choose them for many layers at once.

A rule looks at all its layers together: a parameter goes where it lowers the error most, whether in a first or a last layer, in
heads, queries or values. Errors are those of truncated HOSVDs, of the weights or, whitened, of what the tokens make of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vit_tucker.attention.attend import attend_flops
from vit_tucker.attention.contraction import chain_macs
from vit_tucker.attention.host import HostSpec, count_extras
from vit_tucker.attention.moments import Moments
from vit_tucker.attention.options import RankRule
from vit_tucker.errors import PatchError
from vit_tucker.tensor.allocation import (
    Ranks,
    RankTable,
    least_cost,
    least_error,
    minimise,
    rank_table,
    third_mode_table,
)
from vit_tucker.tensor.metric import metric_root
from vit_tucker.tensor.rotary import RotaryPairs, whiten_rotary
from vit_tucker.tensor.tucker import Pairs

MODES = ("head", "query/output", "key/value")


def full_ranks(spec: HostSpec) -> tuple[Ranks, Ranks]:
    """Returns the largest useful ranks of the pre- and of the post-softmax tensor: a conversion with them is exact (Thm B.2).

    With RoPE each head's pairs keep their rotations, so that the latent key must hold all columns of the G key heads.
    """
    query = min(spec.embed_dim + spec.qkv_bias, spec.attn_dim)
    value, output = min(spec.embed_dim, spec.kv_dim), min(spec.out_dim, spec.attn_dim)
    key = value if spec.rope is None else spec.kv_dim
    return (spec.num_heads, query, key), (spec.num_heads, output, value)


def even_rank(rank: int) -> int:
    """Returns the next lower even number, 2 at least: what latent RoPE, which rotates pairs, makes of a rank."""
    return max(2, rank - rank % 2)


def refuse_odd(spec: HostSpec, name: str, rank: int) -> None:
    """Raises PatchError for a latent key of odd width on a host with RoPE.

    Args:
        spec: the host.
        name: of the rank, for the message.
        rank: width of the latent key.
    """
    if spec.rotates_latent and rank % 2:
        lower = f"{rank - 1} or " if rank > 1 else ""
        raise PatchError(f"{name} {rank} is odd: latent RoPE rotates pairs, choose {lower}{rank + 1}")


def refuse_ranks(spec: HostSpec, pre: Ranks, post: Ranks, shared_kv: bool, query_bias: bool) -> None:
    """Raises PatchError for ranks that a Tucker layer in place of such a host can't have; names the mode and its limit.

    Args:
        spec: the host.
        pre, post: ranks of both tensors.
        shared_kv: one right factor for both.
        query_bias: the layer keeps the host's query bias.
    """
    full = full_ranks(replace(spec, qkv_bias=spec.qkv_bias and query_bias))
    if shared_kv:  # one basis for keys and values
        both = min(2 * spec.kv_dim, spec.attn_dim if spec.rope is not None else min(spec.embed_dim, spec.attn_dim))
        full = tuple((*ranks[:2], max(ranks[2], both)) for ranks in full)  # type: ignore[assignment]
    for name, ranks, limits in (("ranks", pre, full[0]), ("post_ranks", post, full[1])):
        for mode, rank, limit in zip(MODES, ranks, limits, strict=True):
            if rank > limit:
                raise PatchError(f"{name}={list(ranks)}: {mode} rank {rank} is above its full rank {limit}")
    refuse_odd(spec, f"ranks={list(pre)}: key rank", pre[2])
    if shared_kv and pre[2] != post[2]:
        raise PatchError(f"shared_kv needs equal key and value ranks, not {pre[2]} and {post[2]}")


def has_out_bias(spec: HostSpec) -> bool:
    """Returns whether the layer has an output bias, which includes the host's value biases."""
    return spec.proj_bias or spec.qkv_bias


def tensor_weights(r1: Any, r2: Any, r3: Any, heads: int, left: int, right: int) -> Any:
    """Counts H r1 + r1 r2 r3 + I r2 + J r3 weights (Table 1), of numbers or of tensors that broadcast.

    Args:
        r1, r2, r3: ranks.
        heads, left, right: the tensor's size H, I, J.
    """
    return heads * r1 + r1 * r2 * r3 + left * r2 + right * r3


def tensor_macs(r1: Any, r2: Any, r3: Any, heads: int, left: int, right: int, tokens: int) -> Any:
    """Returns the multiply-adds of one tensor for N tokens.

    These are both projections, the core per head in the order that costs least, and what a batch does once: folding the head
    factor into the core, and, where that pays, the core into the projection.

    Args:
        r1, r2, r3: ranks.
        heads, left, right: the tensor's size H, I, J.
        tokens: N.
    """
    return heads * r1 * r2 * r3 + chain_macs(tokens, left, r2, heads * r3) + tokens * right * r3


def whiten(
    pre: Pairs | RotaryPairs, post: Pairs, moments: Moments, scale: float, damping: float
) -> tuple[Pairs | RotaryPairs, Pairs]:
    """Returns both weight tensors in the metrics of the tokens: the squared norm of a change is its error, to first order.

    Args:
        pre, post: of the layer, float64; the results are of the same kinds and shapes.
        moments: of its tokens; the unit of results is that of E (g . dy)^2 there, heads are weighted by their influence.
        scale: softmax scale.
        damping: of the metrics, relative to their mean eigenvalue.
    """
    rows, columns = pre.left.shape[1], pre.right.shape[1]
    query = metric_root(moments.query[:rows, :rows], damping)
    key = metric_root(moments.key_metric(columns), damping)
    output, value = metric_root(moments.output, damping), metric_root(moments.value_metric(), damping)
    traces = moments.given("key_traces").clamp_min(0)  # the mean metric's is 1 per head
    heads = scale * traces.sqrt()
    whitened_post = Pairs(output.root @ post.left, value.root @ post.right)
    if isinstance(pre, RotaryPairs):
        return whiten_rotary(pre, query.root, key.root, heads), whitened_post
    return Pairs(query.root @ pre.left * heads[:, None, None], key.root @ pre.right), whitened_post


@dataclass(frozen=True)
class LayerTables:
    """Cost tables of one layer for a rank rule.

    Attributes:
        pre, post: tables of both tensors.
        fixed: cost that no rank changes.
        dense: cost of the dense layer.
        cache: numbers per token in the dense layer's KV cache.
    """

    pre: RankTable
    post: RankTable
    fixed: float
    dense: float
    cache: int


def layer_tables(
    rule: RankRule, spec: HostSpec, pre: Pairs, post: Pairs, dense: float, calls: int, num_tokens: int
) -> LayerTables:
    """Returns the error and cost tables of one layer.

    Args:
        rule: flops counts operations, all others parameters.
        spec: the host.
        pre, post: its tensors, plain or whitened, in units that compare across layers; with RoPE the lifted pre-softmax tensor.
        dense: cost of the dense layer.
        calls, num_tokens: sequences per image, and tokens of each: for flops.
    """
    heads, width, full = spec.num_heads, spec.embed_dim, full_ranks(spec)

    def parameters(left: int, bias: int, key_bias: int = 0) -> Any:
        return lambda r1, r2, r3: tensor_weights(r1, r2, r3, heads, left, width) + bias * r2 + key_bias * r3

    def flops(left: int) -> Any:
        return lambda r1, r2, r3: (
            calls
            * (2 * tensor_macs(r1, r2, r3, heads, left, width, num_tokens) + attend_flops(heads, num_tokens, r3, 0))
        )

    counts_flops = rule.flops is not None
    costs = (flops(width), flops(spec.out_dim)) if counts_flops else (
        parameters(width, int(spec.qkv_bias), int(spec.latent_key_bias)), parameters(spec.out_dim, 0))  # fmt: skip
    rotary = spec.rope is not None
    table = third_mode_table if rule.cache is not None and rule.budget is None else rank_table
    tables = [
        table(pairs, ranks, cost, rule.multiple_of, rotary=rotary and pairs is pre)
        for pairs, ranks, cost in zip((pre, post), full, costs, strict=True)
    ]
    fixed = 0 if counts_flops else spec.out_dim * has_out_bias(spec) + count_extras(spec)
    groups = heads if spec.num_kv_heads is None else spec.num_kv_heads
    return LayerTables(tables[0], tables[1], fixed, dense, 2 * groups * spec.head_dim)


def choose_ranks(rule: RankRule, layers: Sequence[LayerTables]) -> list[tuple[Ranks, Ranks]]:
    """Returns the ranks of the pre- and post-softmax tensor of each layer.

    Args:
        rule: budget, energy, flops or cache.
        layers: their tables.

    Raises:
        ValueError: the budget is too small; names the smallest possible one.
    """
    tables = [table for layer in layers for table in (layer.pre, layer.post)]
    if rule.cache is not None:
        tables = within_cache(tables, rule.cache * sum(layer.cache for layer in layers))
    share = rule.budget if rule.budget is not None else rule.flops
    if share is None and rule.energy is None:
        chosen = [table.triple(table.error.numel() - 1) for table in tables]
    elif share is None:
        assert rule.energy is not None
        chosen = least_cost(tables, rule.energy)
    else:
        dense, fixed = sum(layer.dense for layer in layers), sum(layer.fixed for layer in layers)
        smallest = (fixed + sum(table.cost.min().item() for table in tables)) / dense
        if smallest > share:
            raise ValueError(f"too small, the smallest ranks need {math.ceil(smallest * 1e4) / 1e4:.4f}")
        chosen = least_error(tables, share * dense - fixed)
    chosen = [useful(ranks) for ranks in chosen]
    return list(zip(chosen[::2], chosen[1::2], strict=True))


def useful(ranks: Ranks) -> Ranks:
    """Returns ranks without what no tensor of them fills: a mode's rank is at most the product of the other two.

    Args:
        ranks: of heads, queries or outputs, keys or values; only the second is lowered.
    """
    heads, middle, third = ranks
    return heads, min(middle, heads * third), third


def within_cache(tables: Sequence[RankTable], entries: float) -> list[RankTable]:
    """Returns the tables at the key and value ranks of least summed error, all other ranks full, that fit into a cache.

    Args:
        tables: of pre- and post-softmax tensors.
        entries: numbers per token that their keys and values may have together.

    Raises:
        ValueError: too few; names the smallest possible share.
    """
    widths = [table.ranks[2].double() for table in tables]
    smallest = sum(width.min().item() for width in widths)
    if smallest > entries:
        raise ValueError(
            f"too small, the smallest key and value ranks need {smallest:.0f} of {entries:.0f} numbers per token"
        )
    chosen = minimise([table.error[-1, -1] for table in tables], widths, entries)
    return [table.at_third(index) for table, index in zip(tables, chosen, strict=True)]
