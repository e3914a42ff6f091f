"""Reads shape, options and weights of attention modules by the names of their parts, whatever their class."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vit_tucker.attention.base import ParameterCount
from vit_tucker.attention.call import PositionBias
from vit_tucker.attention.effective import full_name
from vit_tucker.attention.host import HostSpec, MHAWeights
from vit_tucker.attention.linear import refuse_infinite
from vit_tucker.errors import PatchError


@dataclass(frozen=True)
class Host:
    """An attention layer of a model, read.

    Attributes:
        spec: shape and options.
        weights: canonical weights in the module's dtype; on the meta device they hold no data.
        parameters: what the layer has.
        own: the same weights of the heads that the layer has (G of keys and values): views of its parameters, to write through.
        merged: parts that were not plain by name, with their classes: adapters and parametrizations, merged into the weights.
    """

    spec: HostSpec
    weights: MHAWeights
    parameters: ParameterCount
    own: MHAWeights
    merged: Mapping[str, str] = field(default_factory=dict)

    @property
    def like(self) -> Tensor:
        """Returns a tensor whose device and dtype the replacement gets."""
        return self.weights.query

    def refuse_not_finite(self) -> None:
        """Raises WeightsError for weights, norms or biases that are NaN or infinite; names the first."""
        tensors = dict(vars(self.own))
        for parts in self.spec.extras.values():
            for name, part in parts.items():
                tensors |= dict(part.named_parameters(prefix=name))
        refuse_infinite(tensors.items())


SILENT = (nn.Dropout.forward, nn.Softmax.forward, nn.Identity.forward)
"""What the parts of a host that no method takes over may do."""
Projections = dict[str, Tensor | None]
"""Weights (heads, C, D) and biases (heads, D) of query, key and value under the names of ``MHAWeights``: views of parameters.
Keys and values may have fewer heads than queries."""


def read_fused(m: Any, heads_first: bool = False) -> Projections:
    """Reads one projection ``qkv``, a Linear or 1x1 convolution, with outputs ordered (qkv, head, D) or (head, qkv, D)."""
    order = (m.num_heads, 3, -1) if heads_first else (3, m.num_heads, -1)

    def split(rows: Tensor) -> Tensor:
        parts = rows.unflatten(0, order)
        return parts.transpose(0, 1) if heads_first else parts  # (3, H, D, ...)

    query, key, value = split(m.qkv.weight.flatten(1)).mT.unbind(0)  # each (H, C, D)
    weights: Projections = {"query": query, "key": key, "value": value}
    if getattr(m, "q_bias", None) is not None:  # BEiT, EVA: keys have none, but for a buffer of zeros
        for name, bias in (("query_bias", m.q_bias), ("value_bias", m.v_bias)):
            weights[name] = bias.unflatten(0, (m.num_heads, -1))
    elif m.qkv.bias is not None:
        weights["query_bias"], weights["key_bias"], weights["value_bias"] = split(m.qkv.bias).unbind(0)
    return weights


def read_unfused(m: Any) -> Projections:
    """Reads ``q_proj``, ``k_proj`` and ``v_proj`` as projections of their own; the latter two may have fewer heads."""
    weights: Projections = {}
    for name, linear in (("query", m.q_proj), ("key", m.k_proj), ("value", m.v_proj)):
        heads = m.num_heads if name == "query" else getattr(m, "num_kv_heads", m.num_heads)
        weights[name] = linear.weight.unflatten(0, (heads, -1)).mT  # (heads, C, D)
        if linear.bias is not None:
            weights[f"{name}_bias"] = linear.bias.unflatten(0, (heads, -1))
    return weights


def for_all_heads(projections: Projections, heads: int) -> Projections:
    """Repeats each key/value head for each head of its group, so that there are H of everything."""
    return {
        name: part if part is None or len(part) == heads else part.repeat_interleave(heads // len(part), 0)
        for name, part in projections.items()
    }


def read_split(m: Any) -> Projections:
    """Reads TNT's projections: one ``qk`` for queries and keys, one ``v`` for values."""
    weights: Projections = {}
    for names, linear in ((("query", "key"), m.qk), (("value",), m.v)):
        parts = linear.weight.unflatten(0, (len(names), m.num_heads, -1)).mT
        weights.update(zip(names, parts.unbind(0), strict=True))
        if linear.bias is not None:
            biases = linear.bias.unflatten(0, (len(names), m.num_heads, -1)).unbind(0)
            weights.update({f"{name}_bias": bias for name, bias in zip(names, biases, strict=True)})
    return weights


def make_host(
    m: Any,
    projections: Projections,
    position_bias: PositionBias | None = None,
    heads_last: bool = False,
    fused_attn: bool = True,
    **options: Any,
) -> Host:
    """Makes the Host of a module from its projections; norms, gate and rates are looked up in it: older classes lack some.

    Args:
        m: the module, with ``proj``.
        projections: of the heads.
        position_bias: additive bias of its scores.
        heads_last: the output projection takes its inputs ordered (D, head) instead of (head, D).
        fused_attn: of a module without a switch of that name.
        options: of HostSpec, ``layout`` and ``rope``.

    Raises:
        PatchError: the softmax scale is not that of the head width, or heads of different widths.
    """
    query, value = projections["query"], projections["value"]
    assert query is not None
    assert value is not None
    heads, embed_dim, head_dim = query.shape
    if value.shape[1:] != query.shape[1:]:
        raise PatchError(f"its queries have width {head_dim}, its values {value.shape[-1]}")
    if abs(m.scale - head_dim**-0.5) > 1e-9:
        raise PatchError(f"softmax scale {m.scale} is not 1/sqrt(head_dim) = {head_dim**-0.5}")
    for name in ("attn_drop", "proj_drop", "softmax"):
        part = getattr(m, name, None)
        if part is not None and type(part).forward not in SILENT:
            raise PatchError(f"its {name} is a {full_name(part)}, which no method carries")
    extras: dict[str, dict[str, nn.Module]] = {}
    if not all(isinstance(getattr(m, name, nn.Identity()), nn.Identity) for name in ("q_norm", "k_norm")):
        extras["qk_norm"] = {"q_norm": m.q_norm, "k_norm": m.k_norm}
    if not isinstance(getattr(m, "norm", nn.Identity()), nn.Identity):
        extras["scale_norm"] = {"norm": m.norm}
    if getattr(m, "gate", None) is not None:
        extras["gate"] = {"gate": m.gate}
    if position_bias is not None:
        extras["position_bias"] = {"position_bias": position_bias}
    kv_heads = len(value)
    spec = HostSpec(
        embed_dim=embed_dim,
        num_heads=heads,
        head_dim=head_dim,
        out_dim=m.proj.weight.shape[0],
        qkv_bias=projections.get("query_bias") is not None,
        key_bias=projections.get("key_bias") is not None or projections.get("query_bias") is None,
        num_kv_heads=None if kv_heads == heads else kv_heads,
        proj_bias=m.proj.bias is not None,
        attn_drop=getattr(getattr(m, "attn_drop", None), "p", 0.0),
        proj_drop=getattr(getattr(m, "proj_drop", None), "p", 0.0),
        fused_attn=getattr(m, "fused_attn", fused_attn),
        extras=extras,
        **options,
    )
    out = m.proj.weight.flatten(1).mT  # (H*D, O)
    out = out.unflatten(0, (head_dim, heads)).transpose(0, 1) if heads_last else out.unflatten(0, (heads, head_dim))
    weights = (query.numel() // heads) * (heads + 2 * kv_heads) + out.numel()
    total = sum(p.numel() for p in m.parameters())
    own = MHAWeights(**projections, out=out, out_bias=m.proj.bias)  # type: ignore[arg-type]
    dense = own
    if kv_heads != heads:
        dense = MHAWeights(**for_all_heads(projections, heads), out=out, out_bias=m.proj.bias)  # type: ignore[arg-type]
    return Host(spec, dense, ParameterCount(weights, total - weights), own)
