"""The models of the command: a run's, and the dense one beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import nn

from vit_tucker.attention.module import AttentionModule
from vit_tucker.checkpoint.host_model import create_host, create_teacher, load_host
from vit_tucker.checkpoint.host_weights import open_weights
from vit_tucker.checkpoint.load_dense import dense_host
from vit_tucker.config.schema import ModelConfig, RunConfig
from vit_tucker.errors import CheckpointError, ConfigError, ExplainError
from vit_tucker.hosts.find import find_attention
from vit_tucker.hosts.images import input_channels, input_shape
from vit_tucker.hosts.normalisation import fit_channels
from vit_tucker.inference.predict import model_class_names, open_model
from vit_tucker.patching.record import patch_record

HOST, PRETRAINED, NONE = "host", "pretrained", "none"


@dataclass(frozen=True)
class Subject:
    """A model to look into.

    Attributes:
        kind: "dense", or the method of its attention.
        model: in eval mode.
        data: timm's data config: input_size, mean, std, interpolation, crop_pct, crop_mode.
        label_names: of the classes; None if unknown.
        classifies: its classifier is trained, so that what it says of an image means something.
        weights: what was loaded into a model that is not stored as it is, for the user; '' otherwise.
    """

    kind: str
    model: nn.Module
    data: dict[str, Any]
    label_names: list[str] | None = None
    classifies: bool = True
    weights: str = ""

    @property
    def device(self) -> torch.device:
        """Returns where the model is."""
        return next(self.model.parameters()).device

    @property
    def num_classes(self) -> int:
        """Returns the classes of the model, 0 without a classifier."""
        return int(getattr(self.model, "num_classes", 0))

    @property
    def num_channels(self) -> int:
        """Returns the channels of its images."""
        return input_channels(self.model) or int(self.data["input_size"][0])


def open_subject(where: str) -> Subject:
    """Opens the model that is stored at a place, see ``vit_tucker.inference.predict.open_model``.

    Raises:
        CheckpointError: nothing is there.
    """
    return subject(open_model(where))


def subject(model: nn.Module, data: dict[str, Any] | None = None, classifies: bool = True) -> Subject:
    """Returns a model with the image preparation in its pretrained_cfg.

    Args:
        model: of timm, patched or not.
        data: how images are prepared, if not as pretrained_cfg says.
        classifies: see ``Subject``.
    """
    size = input_shape(model)
    resolved = resolve_data_config({"input_size": size}, model=model) if data is None else data
    normalisation = {name: fit_channels(resolved[name], size[0]) for name in ("mean", "std")}
    resolved = {**resolved, **normalisation, "input_size": size}
    classifies = classifies and bool(getattr(model, "num_classes", 0))
    return Subject(method_of(model), model.eval(), resolved, model_class_names(model), classifies)


def method_of(model: nn.Module) -> str:
    """Returns 'dense', or the method that a patched model has."""
    record = patch_record(model)
    if record is not None:
        return record.config.method
    return "patched" if any(isinstance(module, AttentionModule) for module in model.modules()) else "dense"


def open_dense(choice: str, run: Subject, config: RunConfig | None, where: str) -> Subject | None:
    """Opens the dense model beside a run's.

    Args:
        choice: "host" the dense model that the run started from, None if it started from random weights; "pretrained" timm's
            weights of the run's architecture; "none"; or a run folder, checkpoint, saved folder, hub id or weights file.
        run: the run's model.
        config: of the run; None if only the model is stored.
        where: the run, for messages.

    Raises:
        ConfigError: the choice can't be met. CheckpointError: the weights are missing or don't fit.
    """
    if choice == NONE or (choice == HOST and run.kind == "dense"):
        return None
    if choice == HOST:
        return None if config is None else host_of(config, run)
    if choice == PRETRAINED:
        return pretrained_host(run, config, where)
    file = Path(choice).expanduser()
    if file.is_file():
        if config is None:
            return stored_host(run, file)
        return weights_subject(config.model.model_copy(update={"checkpoint": choice}), run, "--dense")
    try:
        dense = open_subject(choice)
    except CheckpointError as error:
        raise CheckpointError(f"--dense {error}") from None
    if dense.data["input_size"] != run.data["input_size"]:
        sizes = " and ".join(str(one.data["input_size"]) for one in (dense, run))
        raise ConfigError(f"--dense {choice}: takes other images than {where}: {sizes} (channels, height, width)")
    return dense


def host_of(config: RunConfig, run: Subject) -> Subject | None:
    """Returns the dense model that a run started from, with the run's normalisation; None if that had random weights."""
    kept = Path(str(config.output_dir)) / "teacher" / "model.safetensors"
    if config.train.distill is not None and kept.is_file():
        sizes = run.num_classes, run.num_channels
        teacher, _ = create_teacher(config.model, config.train.distill, kept, None, *sizes)
        return subject(teacher, run.data)
    if config.model.checkpoint is not None:
        start = seen_from_run(Path(config.model.checkpoint).expanduser(), Path(str(config.output_dir)))
        model_config = config.model.model_copy(update={"checkpoint": str(start)})
        return weights_subject(model_config, run, "the run's model.checkpoint")
    if config.model.pretrained:
        bare = config.model.model_copy(update={"num_classes": None})
        return subject(create_host(bare, None, run.num_channels), run.data)
    return None


def seen_from_run(path: Path, run: Path) -> Path:
    """Returns a relative path of a run's config from here, else from a folder above the run, where it was started."""
    if path.is_absolute() or path.exists():
        return path
    return next((found for folder in run.resolve().parents if (found := folder / path).exists()), path)


def weights_subject(config: ModelConfig, run: Subject, what: str) -> Subject:
    """Opens a dense model from a weights file or run folder, with the run's normalisation; without a head for other classes.

    Args:
        config: names the weights.
        run: the patched model.
        what: the option that named them, for messages.

    Raises:
        CheckpointError: missing, or not of this model; the message starts with ``what``.
    """
    try:
        found = open_weights(Path(str(config.checkpoint)).expanduser(), config.name).num_classes
        same = found == run.num_classes > 0
        bare = config.model_copy(update={"num_classes": None})
        model, report = load_host(bare, run.num_classes if same else 0, run.num_channels)
    except CheckpointError as error:
        hint = "; --dense names another, --dense none leaves it out"
        raise CheckpointError(str(error).replace("model.checkpoint", what, 1) + hint) from None
    return replace(subject(model, run.data, classifies=same), weights=str(report))


def stored_host(run: Subject, file: Path) -> Subject:
    """Returns the dense host of a stored model, with the weights of a file.

    Raises:
        CheckpointError: they are not of that host.
    """
    try:
        dense = dense_host(run.model, file)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("load_dense", "--dense", 1)) from None
    return subject(dense, run.data, classifies=getattr(dense, "num_classes", 0) == run.num_classes)


def pretrained_host(run: Subject, config: RunConfig | None, where: str) -> Subject:
    """Returns timm's pretrained weights of the run's architecture.

    Args:
        run: the patched model.
        config: of the run, None if it has none.
        where: name of the run, for messages.

    Raises:
        ConfigError: the architecture is not known. CheckpointError: there are no weights.
    """
    if config is None:
        record: Any = patch_record(run.model)
        cfg = getattr(run.model, "pretrained_cfg", None) or {}
        name = getattr(getattr(record, "identity", None), "architecture", None) or cfg.get("architecture")
        if not name:
            raise ConfigError(f"--dense pretrained: {where} does not say which timm model it is")
        tag = f".{cfg['tag']}" if cfg.get("tag") else ""
        size = run.data["input_size"][1:]
        model_config = ModelConfig(name=name + tag, img_size=size if size[0] != size[1] else size[0])
    else:
        model_config = config.model
    bare = model_config.model_copy(update={"pretrained": True, "checkpoint": None, "num_classes": None})
    return subject(create_host(bare, None, run.num_channels))


def subject_names(subjects: Sequence[Subject]) -> list[str]:
    """Returns 'dense' and the method's name; numbered if they are the same."""
    kinds = [one.kind for one in subjects]
    return kinds if len(set(kinds)) == len(kinds) else [f"{kind} {i}" for i, kind in enumerate(kinds, 1)]


def refuse_target(subjects: Sequence[Subject], target: int | None) -> None:
    """Raises ExplainError unless all models have a trained classifier with that class."""
    for name, one in zip(subject_names(subjects), subjects, strict=True):
        if not one.classifies:
            what = f"the {name} model has no trained classifier"
            raise ExplainError(f"--relevance: {what}; --dense none leaves the dense one out")
        if target is not None and not 0 <= target < one.num_classes:
            raise ExplainError(f"--target {target}: the {name} model has the classes 0 to {one.num_classes - 1}")


def refuse_different(subjects: Sequence[Subject]) -> None:
    """Raises ExplainError unless both models have the same attention layers."""
    if len(subjects) < 2:
        return
    one, other = (set(find_attention(subject.model)) for subject in subjects)
    if one != other:
        layer = min(one ^ other)
        raise ExplainError(f"--dense: is another architecture: only one of both models has the attention layer {layer}")
