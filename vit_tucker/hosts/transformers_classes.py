"""Reads the self-attention of transformers' decoders: GPT-2's, and whatever computes what LLaMA's does.

Imported once a module of transformers is met, see ``families``. Which classes have LLaMA's attention, their source decides
(``transformers_source``); grouped heads are read as they are, rotations stay those of the host's table.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.attention.base import ParameterCount
from vit_tucker.attention.effective import full_name
from vit_tucker.attention.host import HostSpec, MHAWeights
from vit_tucker.attention.rope import RopeSpec
from vit_tucker.errors import PatchError
from vit_tucker.hosts.families import EXCLUDE, Family
from vit_tucker.hosts.plain import plain_host
from vit_tucker.hosts.readers import Host, Projections, for_all_heads
from vit_tucker.hosts.transformers_layers import install, read_decoder_call, restore
from vit_tucker.hosts.transformers_library import import_transformers
from vit_tucker.hosts.transformers_models import mark, sequence_length
from vit_tucker.hosts.transformers_source import GPT2, llama_form

MODELS = "transformers.models."
CROSS = "it attends to another sequence (cross-attention)"


def is_cross_attention(module: Any) -> bool:
    """Returns whether a module's keys and values come from another sequence, as far as its class and options say."""
    return "Cross" in type(module).__name__ or bool(getattr(module, "is_cross_attention", False))


def is_self_attention(module: nn.Module) -> bool:
    """Returns whether a module is self-attention, by the name of its class in transformers, or of what that derives from."""
    named = any(
        cls.__name__.endswith("Attention") and cls.__module__.startswith(MODELS) for cls in type(module).__mro__
    )
    inner = any(is_self_attention(part) for part in module.children())  # BertAttention holds a BertSelfAttention
    return named and not inner and not is_cross_attention(module)


def is_left_alone(module: nn.Module) -> bool:
    """Returns whether a module of transformers is cross-attention."""
    return "Attention" in type(module).__name__ and is_cross_attention(module)


def read_transformers(module: nn.Module, model: nn.Module | None, plain: bool) -> Host:
    """Reads an attention module of transformers; arguments as of ``families.read_host``, which raises PatchError alike."""
    place, name = type(module).__module__, type(module).__name__
    import_transformers(name, PatchError)
    if is_cross_attention(module):
        raise PatchError(f"{full_name(module)} can't be replaced: {CROSS}{EXCLUDE}")
    if not place.startswith(MODELS):
        raise PatchError(f"unknown attention class {full_name(module)}{EXCLUDE}")
    reader: Callable[[Any], Host] = read_gpt2
    if (place, name) != (GPT2, "GPT2Attention"):
        try:
            form = llama_form(place, name)
        except PatchError as error:
            raise PatchError(f"{full_name(module)} can't be replaced: {error}{EXCLUDE}") from None

        def reader(m: Any) -> Host:
            return read_llama(
                m, form.rotates == "always" or getattr(m, form.rotates, False), form.norms, form.output_dropout
            )

    with torch.no_grad():
        part, merged = plain_host(module) if plain else (module, {})
        return replace(reader(part), merged=merged)


def read_llama(m: Any, rotates: bool, norms: bool, output_dropout: bool) -> Host:
    """Reads attention with LLaMA's parts: q_proj, k_proj, v_proj and o_proj, fewer key/value heads, norms of heads.

    Args:
        m: the module, plain.
        rotates, norms, output_dropout: see ``LlamaForm``.
    """
    projections: Projections = {}
    for name, linear in (("query", m.q_proj), ("key", m.k_proj), ("value", m.v_proj)):
        projections[name] = linear.weight.unflatten(0, (-1, m.head_dim)).mT  # (heads, C, D)
        if linear.bias is not None:
            projections[f"{name}_bias"] = linear.bias.unflatten(0, (-1, m.head_dim))
    extras = {"qk_norm": {"q_norm": m.q_norm, "k_norm": m.k_norm}} if norms else {}
    return make_host(
        m,
        projections,
        m.o_proj.weight.mT,
        m.o_proj.bias,
        attn_drop=m.attention_dropout,
        proj_drop=m.residual_dropout if output_dropout else 0.0,
        rope=RopeSpec(half=True) if rotates else None,
        extras=extras,
    )


def read_gpt2(m: Any) -> Host:
    """Reads GPT-2's attention, whose Conv1D have weights (in, out), queries, keys and values side by side."""
    weights = m.c_attn.weight.unflatten(1, (3, m.num_heads, -1)).permute(1, 2, 0, 3).unbind(0)  # (H, C, D) each
    biases = m.c_attn.bias.unflatten(0, (3, m.num_heads, -1)).unbind(0)
    names = ("query", "key", "value")
    projections: Projections = dict(zip(names, weights, strict=True))
    projections |= {f"{name}_bias": bias for name, bias in zip(names, biases, strict=True)}
    rates = {"attn_drop": m.attn_dropout.p, "proj_drop": m.resid_dropout.p}
    return make_host(m, projections, m.c_proj.weight, m.c_proj.bias, **rates)


def make_host(m: Any, projections: Projections, out: Tensor, out_bias: Tensor | None, **options: Any) -> Host:
    """Makes the Host of a decoder's attention from its projections.

    Args:
        m: the module.
        projections: of the heads.
        out: output weight as used in ``y @ W``, (H*D, O).
        out_bias: (O,) or None.
        **options: of HostSpec.

    Raises:
        PatchError: biases of some projections only, or values of another width.
    """
    query, value = projections["query"], projections["value"]
    assert query is not None
    assert value is not None
    heads, embed_dim, head_dim = query.shape
    if value.shape[-1] != head_dim:
        raise PatchError(f"its queries have width {head_dim}, its values {value.shape[-1]}")
    has = [projections.get(f"{name}_bias") is not None for name in ("query", "key", "value")]
    if has not in ([True] * 3, [False] * 3):
        raise PatchError("only some of its queries, keys and values have a bias")
    scale = float(m.scaling)
    spec = HostSpec(
        embed_dim=embed_dim,
        num_heads=heads,
        head_dim=head_dim,
        out_dim=out.shape[1],
        qkv_bias=has[0],
        num_kv_heads=None if len(value) == heads else len(value),
        proj_bias=out_bias is not None,
        softmax_scale=None if abs(scale - head_dim**-0.5) < 1e-12 else scale,
        causal=bool(m.is_causal),
        **options,
    )
    out = out.unflatten(0, (heads, head_dim))
    own = MHAWeights(**projections, out=out, out_bias=out_bias)  # type: ignore[arg-type]
    dense = own
    if len(value) != heads:
        dense = MHAWeights(**for_all_heads(projections, heads), out=out, out_bias=out_bias)  # type: ignore[arg-type]
    weights = (query.numel() // heads) * (heads + 2 * len(value)) + out.numel()
    return Host(spec, dense, ParameterCount(weights, sum(p.numel() for p in m.parameters()) - weights), own)


FAMILY = Family(
    is_self_attention=is_self_attention,
    is_left_alone=is_left_alone,
    read=read_transformers,
    restore=restore,
    read_call=read_decoder_call,
    install=install,
    mark=mark,
    sequence_length=sequence_length,
)
