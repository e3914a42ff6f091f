"""Predictions of stored models: opened from a run or a folder, applied to image files, their classes by name."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import infer_imagenet_subset, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vit_tucker.checkpoint import describe
from vit_tucker.checkpoint.libraries import library, library_of
from vit_tucker.checkpoint.load import find, load
from vit_tucker.config.find import CONFIG_FILE
from vit_tucker.config.load import load_config
from vit_tucker.config.schema import DataConfig, RunConfig
from vit_tucker.data.classes import stored_classes
from vit_tucker.data.image_files import AS_STORED, ImageOptions, image_mode, read_image_file
from vit_tucker.data.labels import imagenet_names, synset_names
from vit_tucker.data.splits import choose_classes
from vit_tucker.data.transforms import eval_transform
from vit_tucker.errors import CheckpointError, DataError
from vit_tucker.hosts.images import input_shape

LOGGER = logging.getLogger("vit_tucker")


def open_model(where: str | Path, **overrides: Any) -> nn.Module:
    """Loads a model as ``vit_tucker.load`` does, after the plugins that a run's config names: methods may be the user's own.

    Args:
        where: see ``vit_tucker.load``.
        overrides: arguments of ``timm.create_model``.

    Raises:
        CheckpointError: see ``vit_tucker.load``; or it is a language model. ConfigError: the run's config can't be read.
    """
    run_config(where)
    if (Path(where).expanduser() / CONFIG_FILE).is_file():
        folder, _ = find(where)
        if folder is not None and folder.name != "best":
            LOGGER.warning(f"note: {where}: has no best weights; these are those of {folder.resolve().name}")
    model = load(where, **overrides)
    if library_of(model) is library("transformers"):
        raise CheckpointError(f"{where}: a language model, which `perplexity` scores; a model of images is needed here")
    return model


def run_config(where: str | Path) -> RunConfig | None:
    """Returns the config of the run that a folder is or is a checkpoint of, with its present place; None without one.

    Args:
        where: a run's folder, or one of its checkpoints.

    Raises:
        ConfigError: it can't be read, or a plugin fails.
    """
    folder = run_folder(where)
    return None if folder is None else load_config(folder).model_copy(update={"output_dir": str(folder)})


def run_folder(where: str | Path) -> Path | None:
    """Returns the folder of the run that a folder is or is a checkpoint of; None if it is neither."""
    path = Path(where).expanduser()
    if not path.is_dir():
        return None
    for folder in (path, *list(path.resolve().parents)[:2]):
        if (folder / CONFIG_FILE).is_file() and (folder / "checkpoints").is_dir():
            return folder
    return None


def open_classifier(where: str | Path, **overrides: Any) -> nn.Module:
    """Loads a model as ``open_model`` does, and requires a classifier.

    Raises:
        CheckpointError: see ``open_model``; or the model has no classifier.
    """
    model = open_model(where, **overrides)
    if not getattr(model, "num_classes", 0):
        raise CheckpointError(f"{where}: the model has no classifier (num_classes is 0)")
    return model


def model_class_names(model: nn.Module) -> list[str] | None:
    """Returns the classes' names: the model's label names, for synsets of ImageNet their descriptions; None if there are none.

    Args:
        model: with timm's pretrained_cfg.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    count = getattr(model, "num_classes", 0)
    names = list(cfg.get("label_names") or [])
    if len(names) == count > 0:
        described = {**synset_names(), **(cfg.get("label_descriptions") or {})} if names[0].startswith("n0") else {}
        described = described or (cfg.get("label_descriptions") or {})
        return [str(described.get(name, name)) for name in names]
    subset = infer_imagenet_subset(model)
    names = list(imagenet_names(subset)) if subset else []
    return names if len(names) == count else None


def image_options(model: nn.Module) -> ImageOptions:
    """Returns how image files are read for a stored model: as in its training.

    Raises:
        CheckpointError: its config.json has something else in their place.
    """
    options = describe.image_options(model)
    try:
        return ImageOptions.of(options)
    except (TypeError, ValueError, IndexError, KeyError):
        raise CheckpointError(f"config.json: vit_tucker.images: {options!r} is no way to read images") from None


def classes_for(
    model: nn.Module, where: str | Path | None, data: DataConfig
) -> tuple[tuple[str, ...] | None, list[str]]:
    """Returns the class map by which a stored model is to be scored on a data set, and lines for the user.

    Args:
        model: with timm's pretrained_cfg.
        where: what it was opened from, see ``open_model``; None for a model that was not.
        data: section of a config.

    Returns:
        Names in the order of their numbers; None for those of the data set's own training split.

    Raises:
        DataError: the data set's classes can't be matched to the model's.
    """
    run, stored = (None, None) if where is None else (run_config(where), stored_classes(run_folder(where)))
    cfg = getattr(model, "pretrained_cfg", None) or {}
    own = run is not None and run.data.dataset == data.dataset
    return choose_classes(data, stored, cfg.get("label_names"), int(getattr(model, "num_classes", 0)), own)


@dataclass(frozen=True)
class Guess:
    """One class of a prediction.

    Attributes:
        index: number of the class.
        label: its name; the number if it has none.
        probability: of the softmax.
    """

    index: int
    label: str
    probability: float


class ImageFiles(Dataset):
    """Prepares image files for a model; yields the reason in place of one that can't be read.

    Args:
        files: paths.
        data: timm's data config, see ``resolve_data``.
        options: see ``ImageOptions``.
    """

    def __init__(self, files: Sequence[Path], data: dict[str, Any], options: ImageOptions = AS_STORED) -> None:
        self.files, self.transform, self.options = files, eval_transform(data), options
        self.mode = image_mode(data["input_size"][0])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.transform(read_image_file(self.files[index], self.mode, self.options))
        except DataError as error:
            return index, str(error)


def predict(
    model: nn.Module,
    files: Sequence[Path],
    top_k: int = 5,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> Iterator[tuple[Path, list[Guess] | str]]:
    """Yields the most likely classes of image files.

    Args:
        model: with timm's pretrained_cfg, by which the images are prepared; it goes to the device.
        files: of any format that Pillow reads.
        top_k: how many classes.
        batch_size: images per forward pass.
        device: where to run.
        num_workers: processes that read images; 0: none besides this one.

    Yields:
        Each file with its classes, the likeliest first; with the reason where it can't be read.
    """
    model = model.to(device).eval()
    names = model_class_names(model)
    dataset = ImageFiles(
        files, resolve_data_config({"input_size": input_shape(model)}, model=model), image_options(model)
    )
    loader = DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=list)
    for batch in loader:
        good = [(index, image) for index, image in batch if not isinstance(image, str)]
        guesses: dict[int, list[Guess]] = {}
        if good:
            with torch.inference_mode():
                chances = model(torch.stack([image for _, image in good]).to(device)).float().softmax(1).cpu()
            top = chances.topk(min(top_k, chances.shape[1]), dim=1)
            for (index, _), values, classes in zip(good, top.values.tolist(), top.indices.tolist(), strict=True):
                guesses[index] = [
                    Guess(number, names[number] if names else str(number), value)
                    for value, number in zip(values, classes, strict=True)
                ]
        for index, image in batch:
            yield files[index], guesses[index] if index in guesses else str(image)
