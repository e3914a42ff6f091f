"""The timm host model of a run: created, and started from timm's weights, from a file, or from another run."""

import argparse
import copy
import importlib.util
import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, is_model, list_models, load_state_dict, parse_model_name
from torch import nn

from vit_tucker.config.schema import ModelConfig
from vit_tucker.errors import CheckpointError, ConfigError, nearest
from vit_tucker.patching.find import find_attention
from vit_tucker.patching.identity import PATCHED
from vit_tucker.weights import load_weights, weights_metadata


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


@contextmanager
def weights_only() -> Iterator[None]:
    """In here torch.load reads tensors and plain values and executes nothing, whatever its caller asks for.

    Some ways of loading unpickle anything unless told otherwise, in timm before it made safe loading its default. The
    arguments that timm's training script saves beside its weights are plain values and let through.
    """
    force, force_not = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, force_not)}
    os.environ[force] = "1"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def weights_overlay(checkpoint: Path, name: str, num_classes: int | None) -> dict[str, Any]:
    """pretrained_cfg entries that make timm load a checkpoint as if it were its own: filtered, resampled, head and stem adapted.

    Raises:
        CheckpointError: missing, unreadable, or of a patched model.
    """
    file = checkpoint_file(checkpoint)
    try:
        with weights_only():
            state = load_state_dict(str(file), use_ema=True, weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"model.checkpoint: {file} can't be read as weights: {reason}") from None
    method = weights_metadata(file).get("attention") or method_beside(file)
    if method:
        raise CheckpointError(f"model.checkpoint: {file} holds a model patched with {method}, a dense host is needed")
    overlay: dict[str, Any] = {"state_dict": state, "custom_load": False, "source": None}
    head = next((state[k] for k in ("head.weight", "head.fc.weight", "fc.weight") if k in state), None)
    if head is not None or num_classes is not None:
        overlay["num_classes"] = num_classes if head is None else head.shape[0]
    stems = [state[f"{conv}.weight"] for conv in first_convs(name) if f"{conv}.weight" in state]
    if stems and stems[0].ndim == 4:
        overlay["input_size"] = (stems[0].shape[1], 224, 224)
    return overlay


def method_beside(file: Path) -> str | None:
    """The method of a patched model that timm itself has saved: its weights file says nothing, the config.json beside it does."""
    try:
        config = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
        return config["model_args"]["patch"]["method"] if config["architecture"] == PATCHED else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def first_convs(name: str) -> tuple[str, ...]:
    """Modules of a timm model that see the image, by its pretrained_cfg; ``patch_embed.proj`` where it names none."""
    architecture = name.partition(".")[0]  # a tag may be unknown, and its weights see images as the architecture does
    cfg = get_pretrained_cfg(architecture) if is_model(architecture) else None
    named = cfg.first_conv if cfg else None
    return (named,) if isinstance(named, str) else tuple(named or ("patch_embed.proj",))


def checkpoint_file(path: Path) -> Path:
    """The weights file that a path means: itself, or the last weights of a run or checkpoint folder, of the EMA if it has one.

    A run's best weights were chosen on its evaluation images, so they are taken only where the path names them
    (``checkpoints/best``) or nothing else is there.

    Raises:
        CheckpointError: nothing there.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"model.checkpoint: {path}: no such file or run folder")
    for folder in ("checkpoints/last", "checkpoints/best", "last", "best", "."):
        for name in ("ema.safetensors", "model.safetensors"):
            if (file := path / folder / name).is_file():
                return file
    raise CheckpointError(
        f"model.checkpoint: {path} has no checkpoints/last/model.safetensors and no model.safetensors"
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters of the whole model and of its attention layers."""
    attention = {id(p): p for module in find_attention(model).values() for p in module.parameters()}
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in attention.values())
