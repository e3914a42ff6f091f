"""Accuracy of a stored model on a data set, or of a model in memory."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vit_tucker.checkpoint.load import find
from vit_tucker.config.load import validate_section
from vit_tucker.config.schema import DataConfig, TrainConfig
from vit_tucker.config.source import Source, merge_values, read_overrides
from vit_tucker.data.datasets import dataset_info
from vit_tucker.data.folders import is_folder_set
from vit_tucker.data.loaders import build_loaders
from vit_tucker.data.transforms import resolve_data
from vit_tucker.errors import ConfigError
from vit_tucker.hosts.images import input_shape
from vit_tucker.inference.predict import classes_for, image_options, open_classifier, run_config
from vit_tucker.run.accelerator import create_accelerator
from vit_tucker.show.progress_bars import progress_bar, showing_progress
from vit_tucker.training.coordination import Coordinator
from vit_tucker.training.engine import evaluate as score
from vit_tucker.training.metrics import Scores
from vit_tucker.training.task import ImageTask

LOGGER = logging.getLogger("vit_tucker")
OF_THE_MODEL = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
"""Keys of the data section that a stored model's own config.json decides, unless an override names them."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of a model on the evaluation split of a data set.

    Attributes:
        model: the folder or name that was given; None for a model in memory.
        dataset, split: what it was evaluated on.
        scores: loss, top1, top5 (percent) and count, over all processes, each image counted once.
    """

    model: str | None
    dataset: str
    split: str
    scores: Scores

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        return {"model": self.model, "dataset": self.dataset, "split": self.split, **asdict(self.scores)}


def evaluate(
    model: nn.Module | str | Path,
    data: str | None = None,
    overrides: Sequence[str] = (),
    *,
    batch_size: int | None = None,
    precision: str = "no",
    device: torch.device | str | None = None,
    tell: Callable[[Sequence[str]], None] | None = None,
) -> Evaluation:
    """Evaluates a model on a data set; on several processes where a launcher has started them.

    Args:
        model: run folder, checkpoint, saved folder or OWNER/NAME of the hub, see ``open_model``; or a timm model in memory, which
            moves to the device.
        data: data set, as ``data.dataset`` of a config; the run's own if None.
        overrides: ``data.key=value`` strings.
        batch_size: images per pass; the run's own, or 128, if None.
        precision: of autocast: "no", "bf16" or "fp16".
        device: where it runs: "cpu", "cuda", "cuda:1"; a GPU if there is one, with a launcher that of each process, if None.
        tell: called on the first process with notes about the data, before the evaluation; they are logged if None.

    Raises:
        ConfigError: no data set is named, a key is unknown, or the data set has other classes. CheckpointError: see
            ``open_model``. DataError: the data set is missing or malformed.
    """
    where = None if isinstance(model, nn.Module) else model
    if where is not None:
        find(where)
    section, recipe = evaluation_sections(where, data, overrides, batch_size, precision, on_cpu(device))
    if not isinstance(model, nn.Module):
        model = open_classifier(model)
    info, chosen = dataset_info(section.dataset), with_image_options(section, model, overrides)
    refuse_other_classes(where, model, section.dataset)
    accelerator = create_accelerator(recipe)
    rank, world = accelerator.process_index, accelerator.num_processes
    coordinator = Coordinator(rank, world, recipe.timeout_minutes)
    model.to(accelerator.device)
    resolved = resolve_data(section, info, model, True, input_shape(model))
    classes, notes = coordinator.main_first(lambda: classes_for(model, where, chosen))
    place = (chosen, recipe, resolved, 0, rank, world, accelerator.device.type == "cuda")
    count: Any = model.num_classes
    loaders = coordinator.main_first(
        lambda: build_loaders(
            *place, with_train=False, device=accelerator.device, classes=classes, num_classes=int(count)
        )
    )
    if accelerator.is_main_process:
        (tell or _log)([*notes, *loaders.notes])
    batches = None if loaders.num_eval is None else len(loaders.eval)
    shown = None if accelerator.is_main_process else False
    try:
        with showing_progress(shown), progress_bar(total=batches, unit="batches") as bar:
            task = ImageTask(resolved["input_size"])
            scores = score(model, task, loaders, accelerator, coordinator, after_batch=lambda: bar.update() and None)
    finally:
        loaders.close()
    return Evaluation(None if where is None else str(where), section.dataset, section.val_split, scores)


def on_cpu(device: torch.device | str | None) -> bool:
    """Returns whether a device is the CPU, and makes one of several GPUs that of this process.

    Raises:
        ConfigError: a device on which Accelerate does not run here, or one GPU for several processes.
    """
    if device is None:
        return False
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: an evaluation runs on cpu or cuda")
    if device.index is not None and device.type == "cuda":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                f"--device {device}: the launcher gives each process a GPU of its own; leave the number out"
            )
        torch.cuda.set_device(device)
    return device.type == "cpu"


def _log(notes: Sequence[str]) -> None:
    for note in notes:
        LOGGER.warning("note: %s", note)


def refuse_other_classes(where: str | Path | None, model: nn.Module, dataset: str) -> None:
    """Raises ConfigError if a data set has another number of classes than a model; of folders the class map decides.

    Args:
        where: name of the model for the message, None if it has none.
        model: with ``num_classes``.
        dataset: as in ``data.dataset``.
    """
    theirs = dataset_info(dataset).num_classes
    if not is_folder_set(dataset) and theirs not in (None, model.num_classes):
        raise ConfigError(
            f"{where or 'the model'} has {model.num_classes} classes, the data set {dataset} has {theirs}"
        )


def with_image_options(data: DataConfig, model: nn.Module, overrides: Sequence[str]) -> DataConfig:
    """Returns the data section with the stored model's way to read images, unless an override names another.

    Args:
        data: the data section.
        model: as stored.
        overrides: ``key=value`` of the caller.
    """
    given = {text.partition("=")[0] for text in overrides}
    stored = image_options(model).plain()
    return data.model_copy(update={name: value for name, value in stored.items() if f"data.{name}" not in given})


def evaluation_sections(
    where: str | Path | None,
    dataset: str | None,
    overrides: Sequence[str],
    batch_size: int | None = None,
    precision: str = "no",
    cpu: bool = True,
) -> tuple[DataConfig, TrainConfig]:
    """Returns data and recipe of an evaluation: the run's own, with what is given on top.

    Args:
        where: of the model; None for a model in memory.
        dataset, overrides, batch_size, precision, cpu: see ``evaluate``.

    Raises:
        ConfigError: no data set is named, or a key is unknown.
    """
    for text in overrides:
        if not text.startswith("data.") or "=" not in text:
            raise ConfigError(f"{text}: only keys of the data section, data.key=value, mean something here")
    run = None if where is None else run_config(where)
    if run is None and dataset is None:
        raise ConfigError(f"{where or 'the model'} is no run, which would bring its data set: name one by --data")
    data: dict[str, Any] = {}
    train: dict[str, Any] = {}
    if run is not None:
        kept = run.data.model_dump(mode="json")
        data = kept if dataset in (None, run.data.dataset) else {"root": kept["root"]}
        train = {name: getattr(run.train, name) for name in ("eval_batch_size", "global_batch_size")}
    if dataset is not None:
        data["dataset"] = dataset
    if batch_size is not None:
        train["eval_batch_size"] = batch_size
    train.update(mixed_precision=precision, cpu=cpu)
    for name in OF_THE_MODEL:
        data.pop(name, None)
    source = merge_values(Source({"data": data, "train": train}), read_overrides(overrides))
    return validate_section(DataConfig, source), validate_section(TrainConfig, source)
