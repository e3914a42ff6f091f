"""The causal language model of a run: made by transformers, from its pretrained weights, a folder, or sizes alone."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vit_tucker.config.schema import ModelConfig
from vit_tucker.errors import CheckpointError, ConfigError, how_to_install, nearest, reason_of
from vit_tucker.storage.weights import load_weights

PREFIX = "hf:"
"""What names of transformers' models begin with."""
OF_TIMM = frozenset(ModelConfig.model_fields) - {"name", "pretrained", "checkpoint", "model_kwargs"}
"""Keys of the model section that only timm's models have."""


def is_language_model(config: ModelConfig) -> bool:
    """Returns whether a model section names a language model of transformers."""
    return config.name.startswith(PREFIX)


def load_language_model(config: ModelConfig, vocabulary: int | None = None) -> nn.Module:
    """Makes the dense language model of a run, on the CPU in float32.

    Args:
        config: model section: ``hf:`` and a folder or hub name, or the name of an architecture (llama, gpt2);
            ``model_kwargs`` are entries of its transformers config.
        vocabulary: tokens of the data, the size of a vocabulary that neither ``model_kwargs`` nor a folder names.

    Raises:
        ConfigError: transformers is missing or too old, has no such architecture, or an entry is unknown or can't be.
        CheckpointError: weights are missing or don't fit.
    """
    refuse_without_transformers(config.name)
    refuse_keys_of_timm(config)
    from transformers import AutoModelForCausalLM

    described = describe_architecture(config, vocabulary)
    try:
        if config.pretrained:
            name = config.name.removeprefix(PREFIX)
            return AutoModelForCausalLM.from_pretrained(name, config=described, dtype=torch.float32)
        model: nn.Module = AutoModelForCausalLM.from_config(described, dtype=torch.float32)
    except Exception as error:  # transformers, the hub and safetensors raise anything
        if config.pretrained:
            raise CheckpointError(
                f"model.pretrained: no weights for {config.name} could be loaded: {reason_of(error)}"
            ) from None
        raise ConfigError(f"model: {config.name} can't be built: {reason_of(error)}") from None
    if config.checkpoint is not None:
        load_weights(weights_file(Path(config.checkpoint).expanduser()), model)
    return model


def refuse_without_transformers(name: str) -> None:
    """Raises ConfigError if the library that makes the model ``name`` is not installed, or is too old."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(f"model.name: {name} needs transformers: {how_to_install('hf')}")
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
        raise ConfigError(
            f"model.name: {name} needs transformers 5 or newer, not {transformers.__version__}: {how_to_install('hf')}"
        )


def refuse_keys_of_timm(config: ModelConfig) -> None:
    """Raises ConfigError if a model section of a language model has sizes in timm's words."""
    for key in sorted(OF_TIMM):
        if getattr(config, key) is not None:
            raise ConfigError(
                f"model.{key}: is timm's; of {config.name} set entries of its transformers config: "
                "model.model_kwargs={hidden_size: 256, num_hidden_layers: 4}"
            )


def describe_architecture(config: ModelConfig, vocabulary: int | None) -> Any:
    """Returns the transformers config of a model section; arguments and errors as of ``load_language_model``."""
    from transformers import CONFIG_MAPPING, AutoConfig

    name, given = config.name.removeprefix(PREFIX), dict(config.model_kwargs)
    try:
        if name in CONFIG_MAPPING and not config.pretrained and not Path(name).is_dir():
            defaults = AutoConfig.for_model(name)
            if vocabulary is not None and "vocab_size" not in given:
                given["vocab_size"] = vocabulary
            refuse_unknown_entries(defaults, given)
            return AutoConfig.for_model(name, **ending_within(defaults, given))
        stored = AutoConfig.from_pretrained(name)
        refuse_unknown_entries(stored, given)
        return AutoConfig.from_pretrained(name, **given)
    except ConfigError:
        raise
    except Exception as error:  # of the hub, of JSON, of the config's own checks
        known = [*CONFIG_MAPPING.keys()]
        raise ConfigError(
            f"model.name: {config.name}: neither a folder nor a hub name that can be read here, nor an architecture of "
            f"transformers with these model_kwargs{nearest(name, known)}: {reason_of(error, 300)}"
        ) from None


def refuse_unknown_entries(defaults: Any, given: dict[str, Any]) -> None:
    """Raises ConfigError if an entry is none of a transformers config, which would accept it and ignore it.

    Args:
        defaults: a config of that architecture.
        given: entries by name.
    """
    known = {*defaults.to_dict(), *(getattr(defaults, "attribute_map", None) or {})}
    for key in given:
        if key not in known:
            raise ConfigError(
                f"model.model_kwargs.{key}: {type(defaults).__name__} has no such entry{nearest(key, known)}"
            )


def ending_within(defaults: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Returns entries without special tokens beyond a smaller vocabulary, unless they are given themselves.

    Args:
        defaults: a config of that architecture.
        given: entries by name, ``vocab_size`` among them.
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
    return int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
