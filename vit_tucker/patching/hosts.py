"""The only file that knows timm's attention classes: finds them in a model and reads shape, options and weights.

A host is recognised by its exact class; a subclass may compute something else. A new host is one reader here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import Attention as TimmAttention
from torch import nn

from vit_tucker.attention.base import HostSpec, MHAWeights
from vit_tucker.attention.module import AttentionModule
from vit_tucker.errors import PatchError


@dataclass(frozen=True)
class Host:
    """An attention layer of a model, read.

    Attributes:
        spec: shape and options.
        weights: canonical weights in the module's dtype; on the meta device they hold no data.
    """

    spec: HostSpec
    weights: MHAWeights


def read_timm_attention(module: nn.Module) -> Host:
    """Reader for timm.layers.Attention (in timm.models.vision_transformer before timm 1.0.16).

    Capabilities are asked of the module, not of timm's version: older classes simply lack ``norm`` and ``gate``.
    """
    m: Any = module
    heads, width = m.num_heads, m.qkv.out_features // 3
    extras: dict[str, dict[str, nn.Module]] = {}
    if not isinstance(m.q_norm, nn.Identity) or not isinstance(m.k_norm, nn.Identity):
        extras["qk_norm"] = {"q_norm": m.q_norm, "k_norm": m.k_norm}
    if not isinstance(getattr(m, "norm", nn.Identity()), nn.Identity):
        extras["scale_norm"] = {"norm": m.norm}
    if getattr(m, "gate", None) is not None:
        extras["gate"] = {"gate": m.gate}
    spec = HostSpec(
        embed_dim=m.qkv.in_features,
        num_heads=heads,
        head_dim=width // heads,
        out_dim=m.proj.out_features,
        qkv_bias=m.qkv.bias is not None,
        proj_bias=m.proj.bias is not None,
        attn_drop=m.attn_drop.p,
        proj_drop=m.proj_drop.p,
        fused_attn=m.fused_attn,
        extras=extras,
    )
    if abs(m.scale - spec.scale) > 1e-9:
        raise PatchError(f"softmax scale {m.scale} is not 1/sqrt(head_dim) = {spec.scale}")
    query, key, value = m.qkv.weight.unflatten(0, (3, heads, -1)).mT.unbind(0)  # each (H, C, D)
    biases: dict[str, torch.Tensor] = {}
    if m.qkv.bias is not None:
        names = ("query_bias", "key_bias", "value_bias")
        biases = dict(zip(names, m.qkv.bias.unflatten(0, (3, heads, -1)).unbind(0), strict=True))  # each (H, D)
    out = m.proj.weight.mT.unflatten(0, (heads, -1))  # (H, D, O)
    return Host(spec, MHAWeights(query, key, value, out, out_bias=m.proj.bias, **biases))


READERS: dict[type[nn.Module], Callable[[nn.Module], Host]] = {TimmAttention: read_timm_attention}


def class_name(module: nn.Module) -> str:
    """Full class name, 'timm.layers.attention.Attention'."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def looks_like_attention(module: nn.Module) -> bool:
    """By the class's name and a number of heads: what a user may take for attention, known to us or not."""
    name = type(module).__name__.lower()
    return ("attention" in name or name.endswith("attn")) and hasattr(module, "num_heads")


def is_self_attention(module: nn.Module) -> bool:
    """Whether tokens attend to each other in it: a known class, or a name like one.

    Attention pooling (timm's AttentionPool...) reads tokens out with a learned query, cross-attention takes its queries from
    elsewhere: no weights of ours fit them.
    """
    if isinstance(module, (*READERS, AttentionModule)):
        return True
    name = type(module).__name__
    return looks_like_attention(module) and not name.startswith("AttentionPool") and "Cross" not in name


def find_attention(model: nn.Module) -> dict[str, nn.Module]:
    """All self-attention modules of a model by full name, in the model's order; a shared module under each of its names."""
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if is_self_attention(module)}


def find_other_attention(model: nn.Module) -> list[str]:
    """Full names of attention pooling and cross-attention, which no method replaces."""
    return [
        name for name, module in model.named_modules() if looks_like_attention(module) and not is_self_attention(module)
    ]


def read_host(module: nn.Module) -> Host:
    """Read an attention module.

    Raises:
        PatchError: unknown class, or an option that no method can carry; the message lacks the module's name.
    """
    if isinstance(module, AttentionModule):
        raise PatchError(f"already patched ({type(module).__name__}); call vit_tucker.unpatch(model) first")
    reader = READERS.get(type(module))
    if reader is None:
        known = ", ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in READERS)
        raise PatchError(f"unknown attention class {class_name(module)} (known: {known}); leave it alone with exclude=")
    with torch.no_grad():
        return reader(module)


WRAPPERS = {
    "DistributedDataParallel": "patch the model before it is wrapped (before accelerator.prepare)",
    "DataParallel": "patch the model before it is wrapped",
    "FullyShardedDataParallel": "patch the model before it is wrapped (before accelerator.prepare)",
    "OptimizedModule": "patch the model before torch.compile",
}


def refuse_wrapped(model: nn.Module) -> None:
    """Raise PatchError for a model inside DDP, FSDP or torch.compile: their state would still hold the old modules."""
    for name, module in model.named_modules():
        advice = WRAPPERS.get(type(module).__name__)
        if advice is not None:
            where = f"module '{name}'" if name else "the model"
            raise PatchError(f"{where} is a {type(module).__name__}: {advice}")
