"""The timm host model of a run: created, and started from timm's weights, from a file, or from another run."""

import copy
import importlib.util
import pickle
from pathlib import Path

import timm
from timm.models import is_model, list_models, parse_model_name
from torch import nn

from vit_tucker.checkpoint.dense import weights_only, weights_overlay
from vit_tucker.config.schema import ModelConfig
from vit_tucker.errors import CheckpointError, ConfigError, nearest
from vit_tucker.patching.find import find_attention
from vit_tucker.weights import load_weights


def create_host(config: ModelConfig, num_classes: int | None = None, in_chans: int | None = None) -> nn.Module:
    """Create the dense timm model with its weights.

    Args:
        config: model section.
        num_classes: number of classes; the model's own if None.
        in_chans: image channels; the model's own if None.

    Returns:
        The model on the CPU, float32.

    Raises:
        ConfigError: timm has no such model, or the model doesn't take an argument.
        CheckpointError: the weights are missing or don't fit.
    """
    refuse_unknown_name(config.name)
    pretrained = config.pretrained or config.checkpoint is not None
    given = {"num_classes": num_classes, "in_chans": in_chans}
    kwargs = {**config.timm_kwargs(), **{name: value for name, value in given.items() if value is not None}}
    if config.checkpoint is not None:
        kwargs["pretrained_cfg_overlay"] = weights_overlay(
            Path(config.checkpoint).expanduser(), config.name, num_classes
        )
    try:
        with weights_only():
            model = timm.create_model(config.name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        raise ConfigError(f"model: {config.name} does not take these arguments: {error}") from None
    except (RuntimeError, AssertionError, ValueError, OSError, pickle.UnpicklingError) as error:
        reason = reason_of(error)
        if config.checkpoint is not None:
            raise CheckpointError(
                f"model.checkpoint: {config.checkpoint} does not fit {config.name}: {reason}"
            ) from None
        if config.pretrained:
            raise CheckpointError(f"model.pretrained: no weights for {config.name} could be loaded: {reason}") from None
        raise ConfigError(f"model: {config.name} can't be built: {reason}") from None
    if isinstance(getattr(model, "pretrained_cfg", None), dict):
        model.pretrained_cfg.pop("state_dict", None)  # the overlay's weights, now in the model
    if "_model_args" not in vars(model):  # which newer timm records itself
        model._model_args = {k: v for k, v in kwargs.items() if k != "pretrained_cfg_overlay"}
    return model


def create_teacher(
    config: ModelConfig, source: str, kept: Path, host: nn.Module | None, num_classes: int, in_chans: int
) -> nn.Module:
    """The dense teacher of a run that distils.

    Args:
        config: model section.
        source: "host", or a run folder or weights file.
        kept: where the run keeps its teacher's weights once it has begun; then nothing else is needed.
        host: the dense model with the weights that the run starts from, before it is patched; None if it was not made.
        num_classes, in_chans: see ``create_host``.

    Returns:
        A model of its own on the CPU.

    Raises:
        ConfigError: the host has no trained weights. CheckpointError: the weights are missing or don't fit.
    """
    bare = config.untrained()
    if kept.is_file():
        teacher = create_host(bare, num_classes, in_chans)
        load_weights(kept, teacher)
        return teacher
    if source != "host":
        try:
            return create_host(bare.model_copy(update={"checkpoint": source}), num_classes, in_chans)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace("model.checkpoint", "train.distill.teacher")) from None
    if not config.pretrained and config.checkpoint is None:
        raise ConfigError(
            "train.distill.teacher: the host starts without trained weights; set model.pretrained or model.checkpoint, or name "
            "the teacher's run folder or weights file"
        )
    return copy.deepcopy(host) if host is not None else create_host(config, num_classes, in_chans)


def refuse_unknown_name(name: str) -> None:
    """Raise ConfigError for a name that timm knows neither as a model nor as a place to get one from."""
    scheme, colon, _ = name.partition(":")
    if colon and scheme in ("hf-hub", "hf_hub", "local-dir"):
        try:
            parse_model_name(name)
        except AssertionError:
            raise ConfigError(
                f"model.name: timm {timm.__version__} reads no '{scheme}:' models; name the model, and its weights file in "
                "model.checkpoint"
            ) from None
    elif not is_model(name.partition(".")[0]):
        hint = nearest(name, list_models())
        raise ConfigError(f"model.name: timm {timm.__version__} has no model '{name}'{hint}")


def reason_of(error: Exception) -> str:
    """What timm says of a model that it can't build, in one line."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if "pip install huggingface_hub" in reason and importlib.util.find_spec("huggingface_hub") is not None:
        reason += f" It is installed, but timm {timm.__version__} can't use it: take an older one, or a newer timm."
    return reason


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters of the whole model and of its attention layers."""
    attention = {id(p): p for module in find_attention(model).values() for p in module.parameters()}
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in attention.values())
