"""Surveys which timm models can be patched, from their structure alone, and what each method makes of them.

Models are built on the meta device: no weights, no memory. A method is *exact* for a model if its full-rank conversion gives
the model's own outputs, which tests/contract and benchmarks/hosts.py hold it to; *refused* comes with the reason.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import timm
from torch import nn

from vit_tucker.attention.effective import full_name
from vit_tucker.attention.registry import get_method, list_methods
from vit_tucker.errors import ConfigError, PatchError, nearest, nearest_match
from vit_tucker.hosts.families import EXCLUDE, read_host
from vit_tucker.hosts.find import find_attention, find_other_attention
from vit_tucker.hosts.readers import Host
from vit_tucker.hosts.structure import without_weights
from vit_tucker.patching.identity import PATCHED

EXACT = "exact"
LATENT = "exact (latent RoPE)"


@dataclass(frozen=True)
class ModelEntry:
    """One model of the map: its attention classes, and which methods can replace them.

    Attributes:
        name: of the model in timm, of the family in transformers.
        layers: number of self-attention layers by class.
        features: what they do beyond plain attention, see ``HostSpec.features``.
        heads: their numbers of heads, rising.
        left_alone: number of pooling, cross- and channel attention modules by class.
        methods: by method "exact", "exact (latent RoPE)", "10 of 12 layers: reason", or "refused: reason".
    """

    name: str
    layers: dict[str, int]
    features: tuple[str, ...]
    heads: tuple[int, ...]
    left_alone: dict[str, int]
    methods: dict[str, str]

    def patchable(self, method: str) -> bool:
        """Returns whether ``patch`` can replace all attention layers of the model.

        Args:
            method: one of ``list_methods()``.
        """
        return self.methods[method] in (EXACT, LATENT)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return asdict(self)


def model_names(pattern: str | None = None) -> list[str]:
    """Returns names of timm's models, all or by a wildcard.

    Args:
        pattern: with wildcards, as for ``timm.list_models``; None for all.

    Raises:
        ConfigError: none matches; names the nearest.
    """
    names = [name for name in timm.list_models(pattern or "") if name != PATCHED]
    if not names:
        raise ConfigError(f"no timm model matches '{pattern}'{nearest_pattern(str(pattern))}")
    return names


def nearest_pattern(pattern: str) -> str:
    """Returns '; did you mean X?' for the model that is nearest, or with wildcards for the nearest part of names.

    Args:
        pattern: that matches no model.
    """
    names, core = timm.list_models(), pattern.strip("*")
    if core == pattern:
        return nearest(pattern, names)
    joined = ("_".join(parts[i:j]) for parts in (name.split("_") for name in names)
              for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))  # fmt: skip
    part = nearest_match(core, dict.fromkeys(joined))
    if part is None:
        return ""
    anchored = not pattern.startswith("*") and any(name.startswith(part) for name in names)
    return f"; did you mean '{part if anchored else '*' + part}*'?"


def survey(names: Iterable[str]) -> Iterator[ModelEntry]:
    """Yields the entries of all models that have attention.

    Args:
        names: of timm models.
    """
    for name in names:
        entry = model_entry(name, build_structure(name))
        if entry.layers or entry.left_alone:
            yield entry


def build_structure(name: str) -> nn.Module:
    """Builds a timm model without weights, on the meta device.

    Args:
        name: of a timm model.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return without_weights(lambda: timm.create_model(name, pretrained=False))


def model_entry(name: str, model: nn.Module) -> ModelEntry:
    """Returns the entry of one model, dense, on any device.

    Args:
        name: of the model.
        model: dense, on any device.
    """
    found = list(find_attention(model).values())
    others = (model.get_submodule(other) for other in find_other_attention(model))
    hosts: list[Host] = []
    unread: list[str] = []
    for module in found:
        try:
            hosts.append(read_host(module, model))
        except PatchError as error:
            unread.append(str(error).removesuffix(EXCLUDE).replace(full_name(module), short_name(module)))
    return ModelEntry(
        name=name,
        layers=dict(Counter(map(short_name, found))),
        features=tuple(sorted({feature for host in hosts for feature in host.spec.features})),
        heads=tuple(sorted({count_heads(module) for module in found})),
        left_alone=dict(Counter(map(short_name, others))),
        methods={method: status(method, hosts, unread) for method in list_methods()},
    )


def count_heads(module: nn.Module) -> int:
    """Returns the number of heads of an attention module, as it or its config has it; 0 where neither does.

    Args:
        module: of any library.
    """
    config = getattr(module, "config", None)
    return int(getattr(module, "num_heads", None) or getattr(config, "num_attention_heads", None) or 0)


def short_name(module: nn.Module) -> str:
    """Returns 'eva.EvaAttention' for a timm.models.eva.EvaAttention, 'llama.LlamaAttention' for transformers' in modeling_llama.

    Args:
        module: any.
    """
    place, name = full_name(module).split(".")[-2:]
    return f"{place.removeprefix('modeling_')}.{name}"


def status(method: str, hosts: list[Host], unread: list[str]) -> str:
    """Returns what a method makes of a model's layers.

    Args:
        method: name.
        hosts: layers that could be read.
        unread: why others could not.
    """
    reasons, config = list(unread), get_method(method)
    for host in hosts:
        try:
            full = config.full_rank(host.spec)
            full.refuse_features(host.spec)
            full.check(host.spec)
        except PatchError as error:
            reasons.append(str(error))
    total = len(hosts) + len(unread)
    if not total:
        return "refused: no self-attention between tokens"
    if not reasons:
        latent = config.latent_rope and any(host.spec.rotates_latent for host in hosts)
        return LATENT if latent else EXACT
    why = "; ".join(dict.fromkeys(reasons))
    return f"refused: {why}" if len(reasons) == total else f"{total - len(reasons)} of {total} layers: {why}"
