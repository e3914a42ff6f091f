"""Weights of dense models in files of any kind that timm reads, given to timm as if they were its own; nothing is executed."""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.models import get_pretrained_cfg, is_model, load_state_dict
from torch import Tensor

from vit_tucker.errors import CheckpointError
from vit_tucker.patching.identity import PATCHED
from vit_tucker.weights import weights_metadata

MODEL_KEY = "model.checkpoint"
"""What names a checkpoint in a config."""


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


def weights_overlay(checkpoint: Path, name: str, num_classes: int | None, what: str = MODEL_KEY) -> dict[str, Any]:
    """pretrained_cfg entries that make timm load a checkpoint as if it were its own, see ``overlay_of``.

    Args:
        checkpoint: file or folder, see ``checkpoint_file``.
        name, num_classes: see ``overlay_of``.
        what: names the checkpoint, for messages.

    Raises:
        CheckpointError: missing, unreadable, or of a patched model.
    """
    file = checkpoint_file(checkpoint, what)
    try:
        with weights_only():
            state = load_state_dict(str(file), use_ema=True, weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{what}: {file} can't be read as weights: {reason}") from None
    method = weights_metadata(file).get("attention") or method_beside(file)
    if method:
        hint = (
            "; to go on with it as it is: model.name=local-dir:FOLDER model.pretrained=true"
            if what == MODEL_KEY
            else ""
        )
        raise CheckpointError(f"{what}: {file} holds a model patched with {method}, a dense host is needed{hint}")
    overlay = overlay_of(dict(state), name, num_classes)
    names = config_beside(file).get("label_names")
    if isinstance(names, list) and len(names) == overlay.get("num_classes"):
        overlay["label_names"] = tuple(names)
    return overlay


def overlay_of(state: dict[str, Tensor], name: str, num_classes: int | None) -> dict[str, Any]:
    """pretrained_cfg entries that make timm load a state dict as if it were its own: filtered, resampled, head and stem adapted.

    Args:
        state: of a dense model.
        name: timm's, of the model.
        num_classes: of the weights, where they have no classifier to tell.
    """
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
    config = config_beside(file)
    try:
        return config["model_args"]["patch"]["method"] if config["architecture"] == PATCHED else None
    except (KeyError, TypeError):
        return None


def config_beside(file: Path) -> dict[str, Any]:
    """config.json in the folder of a weights file; empty without one."""
    try:
        config = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def first_convs(name: str) -> tuple[str, ...]:
    """Modules of a timm model that see the image, by its pretrained_cfg; ``patch_embed.proj`` where it names none."""
    architecture = name.partition(".")[0]  # a tag may be unknown, and its weights see images as the architecture does
    cfg = get_pretrained_cfg(architecture) if is_model(architecture) else None
    named = cfg.first_conv if cfg else None
    return (named,) if isinstance(named, str) else tuple(named or ("patch_embed.proj",))


def checkpoint_file(path: Path, what: str = MODEL_KEY) -> Path:
    """The weights file that a path means: itself, or the last weights of a run or checkpoint folder, of the EMA if it has one.

    A run's best weights were chosen on its evaluation images, so they are taken only where the path names them
    (``checkpoints/best``) or nothing else is there.

    Raises:
        CheckpointError: nothing there.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{what}: {path}: no such file or run folder")
    for folder in ("checkpoints/last", "checkpoints/best", "last", "best", "."):
        for name in ("ema.safetensors", "model.safetensors"):
            if (file := path / folder / name).is_file():
                return file
    raise CheckpointError(f"{what}: {path} has no checkpoints/last/model.safetensors and no model.safetensors")
