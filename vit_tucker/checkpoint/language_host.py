"""The causal language model of a run: transformers' pretrained one, one of a folder's sizes, or of an architecture's."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vit_tucker.checkpoint.causal_lm import in_one_line, load_dense_causal_lm, source_of
from vit_tucker.checkpoint.transformers_config import read_entries
from vit_tucker.config.model_section import LANGUAGE_MODEL
from vit_tucker.config.schema import ModelConfig
from vit_tucker.errors import CheckpointError, ConfigError, nearest, reason_of
from vit_tucker.hosts.transformers_library import import_transformers
from vit_tucker.storage.digests import CONFIG, SECTION
from vit_tucker.storage.json_files import read_object
from vit_tucker.storage.weights import load_weights

OF_TIMM = frozenset(ModelConfig.model_fields) - {"name", "pretrained", "checkpoint", "model_kwargs"}
"""Keys of the model section that only timm's models have."""


def is_language_model(config: ModelConfig) -> bool:
    """Returns whether a model section names a language model of transformers."""
    return config.name.startswith(LANGUAGE_MODEL)


def load_language_model(config: ModelConfig, vocabulary: int | None = None, stored: Path | None = None) -> nn.Module:
    """Makes the dense language model of a run, on the CPU in float32.

    Args:
        config: model section: ``hf:`` and what ``load_dense_causal_lm`` loads; or, without weights, also the name of an
            architecture (llama, gpt2). ``model_kwargs`` are entries of the transformers config of a model without weights.
        vocabulary: of the data; the size of the model's where nothing else names one.
        stored: folder of a checkpoint of this model, whose config.json is that of the model.

    Raises:
        ConfigError: transformers is missing or too old, has no such architecture, or an entry is unknown or can't be.
        CheckpointError: weights are missing or don't fit.
    """
    name = config.name.removeprefix(LANGUAGE_MODEL)
    transformers = import_transformers(f"model.name: {config.name}")
    refuse_keys_of_timm(config)
    if config.pretrained:
        if config.model_kwargs:
            raise ConfigError(
                f"model.model_kwargs: the pretrained {name} brings its own; leave them or model.pretrained out"
            )
        return load_dense_causal_lm(name, dtype=torch.float32)
    described = describe_architecture(transformers, name, config.model_kwargs, vocabulary, stored)
    try:
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(described, dtype=torch.float32)
    except Exception as error:  # of any model's constructor
        raise ConfigError(f"model: {config.name} can't be built: {reason_of(error)}") from None
    if config.checkpoint is not None:
        load_weights(weights_file(Path(config.checkpoint).expanduser()), model)
    return model


def refuse_keys_of_timm(config: ModelConfig) -> None:
    """Raises ConfigError if a model section of a language model has sizes in timm's words."""
    for key in sorted(OF_TIMM):
        if getattr(config, key) is not None:
            raise ConfigError(
                f"model.{key}: is timm's; of {config.name} set entries of its transformers config: "
                "model.model_kwargs={hidden_size: 256, num_hidden_layers: 4}"
            )


def describe_architecture(
    transformers: Any, name: str, given: dict[str, Any], vocabulary: int | None, stored: Path | None
) -> Any:
    """Returns the transformers config of a model without weights.

    Args:
        transformers: the package.
        name: of an architecture, or as of ``source_of``.
        given: entries in place of its own.
        vocabulary, stored: see ``load_language_model``.

    Raises:
        ConfigError: no such architecture or entry. CheckpointError: no such folder.
    """
    if stored is not None and (stored / CONFIG).is_file():
        return stored_config(transformers, stored)
    known = transformers.CONFIG_MAPPING.keys()
    if name in known and not Path(name).is_dir():
        defaults = transformers.AutoConfig.for_model(name)
        refuse_unknown_entries(defaults, given)
        size = {"vocab_size": vocabulary} if vocabulary is not None and "vocab_size" not in given else {}
        entries = ending_within(defaults, {**given, **size})
        try:
            return transformers.AutoConfig.for_model(name, **entries)
        except Exception as error:  # of the config's own checks
            raise ConfigError(f"model.model_kwargs: {reason_of(error)}") from None
    try:
        place, options = source_of(name)
    except CheckpointError as error:
        raise ConfigError(
            f"model.name: hf:{name}: no architecture of transformers{nearest(name, known)}; {error}"
        ) from None
    defaults = in_one_line(name, lambda: transformers.AutoConfig.from_pretrained(place, **options))
    refuse_unknown_entries(defaults, given)
    return in_one_line(name, lambda: transformers.AutoConfig.from_pretrained(place, **options, **given))


def stored_config(transformers: Any, folder: Path) -> Any:
    """Returns the transformers config of the host of a checkpoint, dense or patched.

    Args:
        transformers: the package.
        folder: with its config.json.

    Raises:
        CheckpointError: it is no such thing.
    """
    config = read_object(folder / CONFIG)
    entries = read_entries(config, f"{folder}: {CONFIG}")
    values = config if entries.host is None else entries.host
    plain = {name: value for name, value in values.items() if name != SECTION}
    return in_one_line(str(folder), lambda: transformers.CONFIG_MAPPING[entries.host_type].from_dict(plain))


def refuse_unknown_entries(defaults: Any, given: dict[str, Any]) -> None:
    """Raises ConfigError if an entry is none of a transformers config, which would accept it and ignore it.

    Args:
        defaults: a config of that architecture.
        given: entries by name.
    """
    known = {*defaults.to_dict(), *(getattr(defaults, "attribute_map", None) or {})}
    for key in given:
        if key not in known:
            what = f"{type(defaults).__name__} of transformers has no such entry{nearest(key, known)}"
            raise ConfigError(f"model.model_kwargs.{key}: {what}")


def ending_within(defaults: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Returns entries without special tokens beyond a smaller vocabulary, unless they are given themselves.

    Args:
        defaults: a config of that architecture.
        given: entries by name.
    """
    size = given.get("vocab_size", defaults.vocab_size)
    special = {name: getattr(defaults, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    beyond = {name: None for name, value in special.items() if isinstance(value, int) and value >= size}
    return {**beyond, **given}


def weights_file(place: Path) -> Path:
    """Returns the weights of a run folder, of another folder with model.safetensors, or a file as it is.

    Raises:
        CheckpointError: there are none.
    """
    inside = (place, place / "checkpoints" / "last" / "model.safetensors", place / "model.safetensors")
    found = next((file for file in inside if file.is_file()), None)
    if found is None:
        raise CheckpointError(
            f"model.checkpoint: {place}: no run folder, no folder with model.safetensors, and no such file"
        )
    return found


def positions_of(model: nn.Module) -> int | None:
    """Returns the longest text that a model was made for, in tokens; None where its config names none."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


def vocabulary_of(model: nn.Module) -> int:
    """Returns how many different tokens a model knows."""
    config: Any = model.config
    return int(config.vocab_size)
