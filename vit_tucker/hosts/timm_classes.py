"""Finds timm's attention classes in a model and reads shape, options and weights; no other file names them.

A host is recognised by its exact class; a subclass may compute something else. A new host is one reader here.
"""

import copy
import importlib
import inspect
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from timm.layers import use_fused_attn
from torch import nn

from vit_tucker.attention.call import Call, PositionBias, read_call
from vit_tucker.attention.effective import full_name, without_hooks
from vit_tucker.attention.host import HostSpec
from vit_tucker.attention.module import AttentionModule
from vit_tucker.attention.rope import RopeSpec
from vit_tucker.errors import PatchError
from vit_tucker.hosts.families import EXCLUDE, Family
from vit_tucker.hosts.plain import plain_host
from vit_tucker.hosts.readers import Host, make_host, read_fused, read_split, read_unfused


def read_rotary(m: Any, per_head: bool) -> Host:
    """Reads AttentionRope and EvaAttention: fused or unfused projections, key/value heads, norms, gate, rotations.

    Raises:
        PatchError: fused projections with fewer key/value heads.
    """
    if m.qkv is not None and m.num_heads != getattr(m, "num_kv_heads", m.num_heads):
        raise PatchError("fused projections with fewer key/value heads")
    rope = RopeSpec(m.num_prefix_tokens, getattr(m, "rotate_half", False), per_head)
    return make_host(m, read_unfused(m) if m.qkv is None else read_fused(m), rope=rope)


def bias_table(m: Any, *kept: str) -> PositionBias | None:
    """Returns the bias of BEiT and Swin, a table in the attention module: a copy of the module with nothing else in it."""
    if m.relative_position_bias_table is None:
        return None
    source = copy.copy(m)
    for group in ("_parameters", "_buffers", "_modules"):
        setattr(source, group, {name: value if name in kept else None for name, value in getattr(m, group).items()})
    without_hooks(source)
    return PositionBias(source, "_get_rel_pos_bias")


def read_table(m: Any) -> Host:
    """Reads BEiT's Attention and Swin's WindowAttention."""
    bias = bias_table(m, "relative_position_bias_table", "relative_position_index")
    return make_host(m, read_fused(m), bias)


def bias_module(m: Any) -> PositionBias | None:
    """Returns the bias of a ``rel_pos`` module."""
    return None if m.rel_pos is None else PositionBias(m.rel_pos, "get_bias")


def read_maxxvit(m: Any, layout: str) -> Host:
    """Reads the attention of MaxViT and CoAtNet."""
    return make_host(m, read_fused(m, m.head_first), bias_module(m), layout=layout)


def follow_window_size(module: nn.Module, replacement: AttentionModule) -> None:
    """Resizes a host's position bias, if there is one, as that of its replacement was, by timm's ``set_input_size``."""
    bias = replacement.position_bias
    if bias is None:
        return
    source: Any = getattr(module, "rel_pos", module)
    like: Any = bias.source
    if tuple(source.window_size) != tuple(like.window_size):
        source.set_window_size(like.window_size)


def read_sam(m: Any) -> Host:
    """Reads SAM's ViT without relative positions.

    Raises:
        PatchError: relative positions, or a table of rotations.
    """
    if m.use_rel_pos:
        raise PatchError(BY_QUERIES)
    if m.rope is not None:
        raise PatchError("it has its own table of rotations")
    return make_host(m, read_fused(m), layout="grid")


READERS: dict[str, Callable[[Any], Host]] = {
    "timm.models.vision_transformer.Attention": lambda m: make_host(m, read_fused(m)),
    "timm.models.beit.Attention": read_table,
    "timm.models.swin_transformer.WindowAttention": read_table,
    "timm.models.vision_transformer_relpos.RelPosAttention": lambda m: make_host(m, read_fused(m), bias_module(m)),
    "timm.models.maxxvit.AttentionCl": lambda m: read_maxxvit(m, "grid"),
    "timm.models.maxxvit.Attention2d": lambda m: read_maxxvit(m, "channels_first"),
    "timm.models.vision_transformer_sam.Attention": read_sam,
    "timm.models.davit.WindowAttention": lambda m: make_host(m, read_fused(m)),
    "timm.models.nest.Attention": lambda m: make_host(m, read_fused(m), heads_last=True),
    "timm.models.metaformer.Attention": lambda m: make_host(m, read_fused(m)),
    "timm.models.convit.MHSA": lambda m: make_host(m, read_fused(m), fused_attn=use_fused_attn()),
    "timm.models.tnt.Attention": lambda m: make_host(m, read_split(m), fused_attn=use_fused_attn()),
    "timm.models.volo.Attention": lambda m: make_host(m, read_fused(m), layout="grid"),
    "timm.models.fastvit.Attention": lambda m: make_host(m, read_fused(m), layout="channels_first"),
    "timm.models.visformer.Attention": lambda m: make_host(m, read_fused(m), layout="channels_first"),
}
"""Readers by the class's place in timm. Classes without ``fused_attn`` get what timm's others ask for when they are built."""
ROTARY = ("timm.layers.attention.AttentionRope", "timm.models.eva.EvaAttention")

COSINE = "cosine attention: the scores of normalised queries and keys, scaled head by head"
COARSER = "its keys and values come from a coarser grid"
POOLED = "its queries are pooled"
MERGED = "attention and MLP share their projections in one block"
BY_QUERIES = "its relative position bias depends on the queries: no additive mask carries it"
CONVOLUTIONS = "its projections are strided or spatial convolutions"
CHANNELS = "channels attend, not tokens"
REFUSED = {
    "timm.models.convit.GPSA": "positional attention is mixed in after the softmax",
    "timm.models.cait.TalkingHeadAttn": "its heads are mixed before and after the softmax",
    "timm.models.swin_transformer_v2.WindowAttention": COSINE,
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": COSINE,
    "timm.models.levit.Attention": "its values are wider than its queries, and batch norms follow its projections",
    "timm.models.levit.AttentionDownsample": "its queries come from a coarser grid than its keys",
    "timm.models.efficientformer.Attention": "its values are wider than its queries",
    "timm.models.efficientformer_v2.Attention2d": "its heads are mixed before and after the softmax",
    "timm.models.efficientformer_v2.Attention2dDownsample": "its queries come from a coarser grid than its keys",
    "timm.models.tiny_vit.Attention": "it normalises its own input",
    "timm.models.mvitv2.MultiScaleAttention": "its queries, keys and values are pooled",
    "timm.models.mvitv2.MultiScaleAttentionPoolFirst": "its queries, keys and values are pooled",
    "timm.models.hieradet_sam2.MultiScaleAttention": POOLED,
    "timm.models.hiera.MaskUnitAttention": "its queries are pooled within mask units",
    "timm.models.pvt_v2.Attention": COARSER,
    "timm.models.twins.GlobalSubSampleAttn": COARSER,
    "timm.models.twins.LocallyGroupedAttn": "it cuts its input into windows itself",
    "timm.models.nextvit.EfficientAttention": COARSER,
    "timm.models.gcvit.WindowAttentionGlobal": "its queries may come from outside",
    "timm.models.coat.FactorAttnConvRelPosEnc": "factorised attention: there are no scores between tokens",
    "timm.models.efficientvit_msra.CascadedGroupAttention": "each head's input is the output of the one before",
    "timm.models.efficientvit_msra.LocalWindowAttention": "its heads follow one another",
    "timm.models.cpubone.ConvAttention": CONVOLUTIONS,
    "timm.models.lowformer.ConvAttention": CONVOLUTIONS,
    "timm.layers.attention2d.MultiQueryAttention2d": CONVOLUTIONS,
    "timm.models.gemma4_vit.Gemma4Attention": "its values are normalised, and its scores are not scaled",
    "timm.layers.diff_attention.DiffAttention": "its weights are the difference of two softmaxes",
    "timm.layers.halo_attn.HaloAttn": BY_QUERIES,
    "timm.layers.bottleneck_attn.BottleneckAttn": BY_QUERIES,
    "timm.models.vision_transformer.ParallelScalingBlock": MERGED,
    "timm.models.vision_transformer.DiffParallelScalingBlock": MERGED,
}
"""Why no method of ours can take such a layer's place."""
LEFT_ALONE = {
    "timm.models.cait.ClassAttn": "only the class token attends",
    "timm.models.volo.ClassAttention": "only the class token attends",
    "timm.models.volo.OutlookAttention": "its weights come from a projection, not from queries and keys",
    "timm.models.xcit.XCA": CHANNELS,
    "timm.models.edgenext.CrossCovarianceAttn": CHANNELS,
    "timm.models.davit.ChannelAttention": CHANNELS,
    "timm.models.davit.ChannelAttentionV2": CHANNELS,
}
"""What stands beside self-attention and stays as it is."""


MIXED_ROPE = "timm.layers.pos_embed_sincos.RotaryEmbeddingMixed"
"""The embedding whose tables differ from head to head."""
MIXED_FLAGS = ("rope_mixed", "rope_is_mixed")
"""How timm's models with RoPE (Eva, NaFlexVit) say that theirs do."""


def classes_at(places: Iterable[str]) -> dict[type[nn.Module], str]:
    """Returns the classes that this timm has of those at places 'module.Class', with their places."""
    found: dict[type[nn.Module], str] = {}
    for place in places:
        module, _, name = place.rpartition(".")
        with suppress(ImportError):
            cls = getattr(importlib.import_module(module), name, None)
            if isinstance(cls, type):
                found[cls] = place
    return found


READERS_BY_CLASS = {cls: READERS[place] for cls, place in classes_at(READERS).items()}
ROTARY_CLASSES = tuple(classes_at(ROTARY))
MIXED_ROPE_CLASSES = tuple(classes_at([MIXED_ROPE]))
REASONS_BY_CLASS = {cls: REFUSED[place] for cls, place in classes_at(REFUSED).items()}
LEFT_ALONE_BY_CLASS = {cls: LEFT_ALONE[place] for cls, place in classes_at(LEFT_ALONE).items()}
SELF_ATTENTION = (*READERS_BY_CLASS, *ROTARY_CLASSES, *REASONS_BY_CLASS)
"""Classes in which tokens attend to each other, whether a method of ours can take their place or not."""


def has_mixed_rope(model: nn.Module) -> bool:
    """Returns whether a model rotates head by head, by its own flag or by its embedding, timm's or derived from it."""
    return any(
        isinstance(module, MIXED_ROPE_CLASSES) or any(getattr(module, flag, False) for flag in MIXED_FLAGS)
        for module in model.modules()
    )


def read_timm(module: nn.Module, model: nn.Module | None, plain: bool) -> Host:
    """Reads an attention module of timm's; arguments as of ``families.read_host``, which raises PatchError alike."""
    cls = type(module)
    reason = REASONS_BY_CLASS.get(cls, LEFT_ALONE_BY_CLASS.get(cls))
    if reason is not None:
        raise PatchError(f"{full_name(module)} can't be replaced: {reason}{EXCLUDE}")
    with torch.no_grad():
        if cls in (*ROTARY_CLASSES, *READERS_BY_CLASS):
            part, merged = plain_host(module) if plain else (module, {})
            if cls in ROTARY_CLASSES:
                host = read_rotary(part, model is not None and has_mixed_rope(model))
            else:
                host = READERS_BY_CLASS[cls](part)
            return replace(host, merged=merged)
    raise PatchError(f"unknown attention class {full_name(module)}{EXCLUDE}")


def read_timm_call(module: nn.Module, spec: HostSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Reads a call of a module of timm's.

    Args:
        module: the host's.
        spec: of it.
        args, kwargs: of the call.
    """
    bias: Any = spec.extras.get("position_bias", {}).get("position_bias")
    return read_call(spec.layout, bias, **inspect.signature(module.forward).bind(*args, **kwargs).arguments)


FAMILY = Family(
    is_self_attention=lambda module: isinstance(module, SELF_ATTENTION),
    is_left_alone=lambda module: type(module) in LEFT_ALONE_BY_CLASS,
    read=read_timm,
    restore=follow_window_size,
    read_call=read_timm_call,
)
