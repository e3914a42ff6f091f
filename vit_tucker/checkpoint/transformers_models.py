"""Models of transformers, patched or dense: written into a folder, and rebuilt from it or from transformers' own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.checkpoint.causal_lm import load_dense_causal_lm
from vit_tucker.checkpoint.libraries import ModelLibrary, ModelPlace
from vit_tucker.checkpoint.rebuild import check_layers, verified_weights
from vit_tucker.checkpoint.tensor_files import WEIGHTS, read_safetensors
from vit_tucker.checkpoint.transformers_config import describe_transformers, read_entries, structure_of
from vit_tucker.checkpoint.transformers_structure import fill_structure, untied_state
from vit_tucker.errors import CheckpointError, nearest
from vit_tucker.hosts.transformers_library import import_transformers, quiet_transformers
from vit_tucker.patching.record import patch_records
from vit_tucker.storage.digests import CONFIG, SECTION
from vit_tucker.storage.weights import whole, without_wrappers

PATCHED_WEIGHTS = "patched.safetensors"
"""Name of a patched model's weights: transformers looks for ``model.safetensors``, and would start the attention at random."""
AVERAGED = "ema.safetensors"
OVERRIDES = ("dtype", "attn_implementation")


def header_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns strings for the header of the weights: the model's class, its methods and, as JSON, their options and ranks."""
    section = config[SECTION]
    entries = {"architecture": section["model_class"], "attention": ""}
    for name, key in (("attention", "patch"), ("linear", "linear_patch")):
        if (values := section.get(key)) is not None:
            entries |= {name: values["method"], f"{name}_config": json.dumps(values)}
    return entries


def name_of_weights(config: Mapping[str, Any]) -> str:
    """Returns the name of the weights in a folder with this config.json."""
    return WEIGHTS if config[SECTION].get("host") is None else PATCHED_WEIGHTS


def stored_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns what is stored of a model: whole tensors, tied ones once, under names without those of wrappers."""
    return {without_wrappers(name): whole(value) for name, value in untied_state(model).items()}


def write_tokenizer(model: nn.Module, folder: Path, tokenizer: Any) -> None:
    """Writes a tokenizer into a model's folder, and a dense model's generation config, for transformers.

    Args:
        model: of transformers.
        folder: where it was written.
        tokenizer: of transformers; none if None.
    """
    patched = bool(patch_records(model))
    (folder / (WEIGHTS if patched else PATCHED_WEIGHTS)).unlink(missing_ok=True)  # of the model that was there before
    generation: Any = getattr(model, "generation_config", None)
    with quiet_transformers(progress=False):
        if generation is not None and not patched:
            generation.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def is_ours(config: Mapping[str, Any]) -> bool:
    """Returns whether a config.json is one of ``describe_transformers``, and not transformers' own."""
    section = config.get(SECTION)
    return isinstance(section, Mapping) and "library" in section


def load_transformers(
    place: ModelPlace, config: dict[str, Any], verify: bool, overrides: Mapping[str, Any]
) -> nn.Module:
    """Rebuilds a model of transformers from a place; see ``vit_tucker.load``, which raises CheckpointError alike.

    Args:
        place: a folder or a repository.
        config: its config.json, of ``describe_transformers`` or transformers' own.
        verify: refuse what has changed since it was saved.
        overrides: ``dtype`` and ``attn_implementation``, in place of the stored ones.
    """
    unknown = [name for name in overrides if name not in OVERRIDES]
    if unknown:
        raise CheckpointError(f"{place.origin}: {unknown[0]}: {' or '.join(OVERRIDES)}{nearest(unknown[0], OVERRIDES)}")
    dtype, attention = overrides.get("dtype"), overrides.get("attn_implementation")
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise CheckpointError(f"{place.origin}: dtype: a torch.dtype, not {dtype!r}")
    if not is_ours(config):
        where = place.folder if place.hub_id is None else place.origin
        return load_dense_causal_lm(str(where), dtype=dtype, attn_implementation=attention)
    import_transformers(place.origin, CheckpointError)
    entries = read_entries(config, f"{place.origin}: {CONFIG}")
    name = name_of_weights(config)
    file, _ = verified_weights(place, config, verify, AVERAGED, *dict.fromkeys([WEIGHTS, name]))
    model = structure_of(config, place.origin, attention)
    fill_structure(model, read_safetensors(file), str(file), dtype)
    check_layers(model, config, place.origin)
    if entries.generation is not None:
        from transformers import GenerationConfig

        vars(model)["generation_config"] = GenerationConfig.from_dict(entries.generation)
    return model.eval()


LIBRARY = ModelLibrary(
    describe_transformers, header_of, name_of_weights, stored_state, write_tokenizer, load_transformers
)
