"""config.json of a saved model of transformers: its own config, the patch, and what makes transformers refuse a patched one.

A dense model's is transformers' own config.json with a section of ours. A patched model's holds transformers' config in that
section, which has no ``model_type``: transformers looks for that in nested values too, and would build a dense model from it.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from vit_tucker.checkpoint.describe import describe_patch, refuse_altered_weights
from vit_tucker.checkpoint.layout import Name, OtherSlot
from vit_tucker.checkpoint.structure import differences
from vit_tucker.checkpoint.transformers_structure import build_structure
from vit_tucker.errors import CheckpointError, VitTuckerError, and_more
from vit_tucker.hosts.slot import SLOTS
from vit_tucker.patching.identity import patch_values
from vit_tucker.patching.record import configs_of, patch_records
from vit_tucker.storage.digests import SECTION, Stored
from vit_tucker.storage.json_files import Strict, checked
from vit_tucker.version import __version__

LIBRARY_NAME = "transformers"
REFUSAL = "patched: load it by vit_tucker.load(folder)"
"""Stands where transformers expects a model type and the size of the vocabulary, so that its messages show it."""
ELSEWHERE = ("transformers_version", "_name_or_path", "model_type", SECTION)
"""Entries of transformers' config that don't describe the model, or stand elsewhere."""


class TransformersEntries(Strict):
    """Entries of ours in config.json of a model of transformers, under the key ``vit_tucker``.

    Attributes:
        version: of vit_tucker.
        library, library_version: "transformers", and its version.
        model_class, host_type: transformers' class of the model, and its ``model_type``.
        host: transformers' config of a patched model; None where it stands around this section.
        attn_implementation: transformers' attention implementation.
        generation: transformers' generation config.
        patch, linear_patch: configs of the patches.
        method, layers, linear: what ``describe_patch`` returns.
        stored: digests.
    """

    version: Annotated[str, Field(max_length=50)]
    library: Name
    library_version: Annotated[str, Field(max_length=50)]
    model_class: Name
    host_type: Name
    host: dict[str, Any] | None = None
    attn_implementation: Annotated[str, Field(max_length=100)] | None = None
    generation: dict[str, Any] | None = None
    patch: dict[str, Any] | None = None
    linear_patch: dict[str, Any] | None = None
    method: Name | None = None
    layers: dict[str, dict[str, Any]] | None = None
    linear: OtherSlot | None = None
    stored: Stored | None = None


def describe_transformers(model: nn.Module, *, tokenizer: Any = None, **options: Any) -> dict[str, Any]:
    """Returns the config.json that rebuilds a model of transformers, patched or dense; checked by building it without weights.

    Args:
        model: of transformers.
        tokenizer: written beside the model.
        **options: of ``vit_tucker.save`` for timm models; None.

    Raises:
        CheckpointError: the model isn't what transformers builds from its config; names what differs.
    """
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise CheckpointError(f"{given[0]}: for models of timm, not for {type(model).__name__} of transformers")
    if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
        raise CheckpointError(
            f"tokenizer: {type(tokenizer).__name__} is none of transformers: it has no save_pretrained()"
        )
    records, hf_config = patch_records(model), host_config(model)
    values = host_values(model)
    section = {
        "version": __version__,
        "library": LIBRARY_NAME,
        "library_version": transformers_version(),
        "model_class": type(model).__name__,
        "host_type": hf_config.model_type,
        "attn_implementation": getattr(hf_config, "_attn_implementation", None),
        "generation": generation_values(model),
    }
    if records:
        patches = {SLOTS[name].argument: patch_values(config) for name, config in configs_of(records).items()}
        section |= {"host": values, **patches, **describe_patch(model)}
        config = {"model_type": REFUSAL, "vocab_size": REFUSAL, SECTION: section}
    else:
        config = {
            **values,
            "model_type": hf_config.model_type,
            "transformers_version": transformers_version(),
            SECTION: section,
        }
    refuse_other_model(model, config)
    return config


def host_config(model: Any) -> Any:
    """Returns transformers' config of a model; raises CheckpointError for a class that transformers doesn't have by itself."""
    if not type(model).__module__.startswith("transformers."):
        raise CheckpointError(
            f"{type(model).__module__}.{type(model).__name__} is no class of transformers itself, so it can't be rebuilt without "
            "running code from elsewhere"
        )
    return model.config


def host_values(model: Any) -> dict[str, Any]:
    """Returns the entries of a model's config that describe it, as JSON has them.

    Raises:
        CheckpointError: its weights are quantised.
    """
    values: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    quantised = values.pop("quantization_config", None)
    if (
        isinstance(quantised, Mapping) and quantised.get("quant_method") != "gguf"
    ):  # which are plain weights once they are read
        raise CheckpointError(
            f"{type(model).__name__}: quantised weights ({quantised.get('quant_method')}) can't be saved"
        )
    values = {name: value for name, value in values.items() if name not in ELSEWHERE}
    return values | {"dtype": str(model.dtype).removeprefix("torch."), "architectures": [type(model).__name__]}


def generation_values(model: Any) -> dict[str, Any] | None:
    """Returns the entries of a model's generation config that differ from transformers' own; None without one."""
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return None
    values: dict[str, Any] = json.loads(generation.to_json_string(use_diff=True))
    return {name: value for name, value in values.items() if name != "transformers_version"}


def transformers_version() -> str:
    """Returns the version of the installed transformers."""
    import transformers

    return str(transformers.__version__)


def read_entries(config: Mapping[str, Any], where: str) -> TransformersEntries:
    """Returns our entries of a config.json; raises CheckpointError if they have another form."""
    return checked(TransformersEntries, config.get(SECTION), f"{where}: {SECTION}")


def structure_of(config: Mapping[str, Any], where: str, attention: str | None = None) -> nn.Module:
    """Builds the model of a config.json without its parameters.

    Args:
        config: of ``describe_transformers``.
        where: names it, for messages.
        attention: name of an attention implementation in place of the stored one.

    Raises:
        CheckpointError: it describes no model of the installed transformers.
    """
    entries = read_entries(config, where)
    values = {k: v for k, v in config.items() if k not in ELSEWHERE} if entries.host is None else entries.host
    patches = {"attention": entries.patch, "linear": entries.linear_patch}
    given = {name: patch for name, patch in patches.items() if patch is not None}
    chosen = attention or entries.attn_implementation
    try:
        return build_structure(entries.host_type, entries.model_class, values, chosen, given)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except VitTuckerError as error:
        raise CheckpointError(f"{where}: the model can't be built: {error}") from None


def refuse_other_model(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a config.json builds another model than the one it describes."""
    found = list(differences(model, structure_of(config, "config.json")))
    if found:
        refuse_altered_weights(model)
        raise CheckpointError(
            f"transformers builds another model by the config that the model has: {'; '.join(found[:3])}{and_more(found, 3)}"
        )
