"""Surveys which families of transformers' causal language models can be patched, from models of their default sizes."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from vit_tucker.analysis.host_map import ModelEntry, model_entry
from vit_tucker.attention.registry import list_methods
from vit_tucker.errors import ConfigError, nearest, shorten
from vit_tucker.hosts.transformers_library import import_transformers, quiet_transformers

MOST = 200
"""Characters of a reason: some quote a statement of the family's source."""


def families() -> dict[str, str]:
    """Returns the class of causal language models of each family, by transformers' ``model_type``.

    Raises:
        ConfigError: transformers is missing.
    """
    import_transformers("--library transformers")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()))


def family_names(pattern: str | None = None) -> list[str]:
    """Returns names of families, all or by a wildcard; raises ConfigError if none matches."""
    names = list(families())
    found = names if pattern is None else [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise ConfigError(f"no family of transformers matches '{pattern}'{nearest(str(pattern).strip('*'), names)}")
    return found


def build_family(name: str) -> nn.Module:
    """Builds a causal language model of a family's default config on the meta device; raises whatever its constructor raises.

    Where the defaults alone make no model, they are tried with a head width from the other sizes, and as a decoder.

    Args:
        name: transformers' ``model_type``.
    """
    transformers: Any = import_transformers(name)
    with quiet_transformers(progress=False), torch.device("meta"):
        config = transformers.AutoConfig.for_model(name)
        width = getattr(config, "hidden_size", 0) // (getattr(config, "num_attention_heads", None) or 1)
        attempts: list[dict[str, Any]] = [{}, {"head_dim": width}, {"is_decoder": True}]
        errors = []
        for options in attempts:
            try:
                given = transformers.AutoConfig.for_model(name, **options)
                model: nn.Module = transformers.AutoModelForCausalLM.from_config(given)
                return model
            except Exception as error:  # constructors of 200 families
                errors.append(error)
        raise errors[0]


def survey_families(names: Iterable[str]) -> Iterator[ModelEntry]:
    """Yields the entries of all families that have attention, or whose default config builds no model.

    Args:
        names: of ``family_names``.
    """
    for name in names:
        try:
            model = build_family(name)
        except Exception:  # see build_family
            refused = "refused: transformers builds no model of its default config"
            yield ModelEntry(name, {}, (), (), {}, dict.fromkeys(list_methods(), refused))
            continue
        entry = model_entry(name, model)
        if entry.layers or entry.left_alone:
            methods = {method: without_class(status) for method, status in entry.methods.items()}
            yield replace(entry, methods=methods)


def without_class(status: str) -> str:
    """Returns a status without the classes of its reasons, which the row names: many families are refused for the same reason."""
    verdict, colon, reasons = status.partition(": ")
    parts = (reason.partition(" can't be replaced: ")[2] or reason for reason in reasons.split("; "))
    return verdict + colon + "; ".join(dict.fromkeys(shorten(part, MOST) for part in parts))
