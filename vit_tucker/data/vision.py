"""torchvision's data sets (torch/): which splits there are, names of classes and labels as this package has them."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset
from torchvision.datasets import ImageNet

from vit_tucker.data.image_files import AS_STORED, ImageOptions, to_mode
from vit_tucker.data.naming import TRAIN_SPLITS, VALIDATION_SPLITS
from vit_tucker.data.split_source import OWN_OPTIONS, SplitSource
from vit_tucker.errors import DataError, nearest

TWO_PARTS = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
FOLDERS = ("folder", "image_folder")
SPLITS = {
    **dict.fromkeys(TWO_PARTS, (*TRAIN_SPLITS, *VALIDATION_SPLITS, "test")),
    "imagenet": ("train", *VALIDATION_SPLITS),
    "places365": (*TRAIN_SPLITS, "train-standard", "train-challenge", *VALIDATION_SPLITS),
}
"""Splits of the sets that have the same ones everywhere; timm reads the test set of the first ones for any other word."""


def open_vision(source: SplitSource) -> Any:
    """Opens one of torchvision's data sets by timm's factory; images of files come as they are stored.

    Raises:
        DataError: a split that the set does not have, missing files, or images without labels.
    """
    name, split, root = source.name, source.split, source.root
    kind = name.partition("/")[2].lower()
    known = SPLITS.get(kind)
    if known is not None and split not in known:
        raise DataError(f"{name} has no split '{split}', known: {', '.join(known)}{nearest(split, known)}")
    if kind in FOLDERS:
        check_vision_folder(name, split, root)
    try:
        if kind == "imagenet":  # which older timm opens with an argument that torchvision does not have
            own = {key: value for key, value in source.options.items() if key not in OWN_OPTIONS}
            opened: Any = ImageNet(str(root), "train" if split == "train" else "val", **own)
        else:
            opened = create_dataset(name, root=str(root), split=split, **source.options)
    except Exception as error:
        raise source.cant_open(error) from error
    if callable(getattr(opened, "loader", None)):
        opened.loader = as_stored  # torchvision's own would make RGB of 16-bit images, cut off at 255
    targets = getattr(opened, "targets", None)
    if isinstance(targets, list) and None in targets:
        raise DataError(f"{name}, split '{split}': its images have no labels; unlabelled images can't be used")
    return opened


def check_vision_folder(name: str, split: str, root: Path) -> None:
    """Raises DataError if there is no folder for a split; timm would read all of the root instead.

    Args:
        name: of the data set, for the message.
        split: name of the split.
        root: folder of the data set.
    """
    names = next((group for group in (TRAIN_SPLITS, VALIDATION_SPLITS) if split in group), ())
    if not any((root / folder).is_dir() for folder in (split, *names)):
        there = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        raise DataError(
            f"{name}: no image folder for split '{split}', searched {root} (expected {root}/{split}/<class>/<image>)"
            f"{nearest(split, there)}"
        )


def as_stored(path: str) -> Image.Image:
    """Returns the image of a file in the mode that it is stored in."""
    with Image.open(path) as image:
        image.load()
        return image


class ConvertedDataset(Dataset):
    """A data set of PIL images of torchvision or timm, converted to another PIL mode.

    Args:
        dataset: yields (PIL image, label).
        mode: PIL mode of the returned images.
        options: see ``ImageOptions``.
    """

    def __init__(self, dataset: Any, mode: str, options: ImageOptions = AS_STORED) -> None:
        self.dataset, self.mode, self.options = dataset, mode, options

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.dataset[index]
        return to_mode(image, self.mode, self.options), int(label)

    def image_name(self, index: int) -> str | None:
        """Returns the path of an image of torchvision's folders; None for other sets."""
        samples = getattr(self.dataset, "samples", None)
        return str(samples[index][0]) if isinstance(samples, list) else None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, in the order of their numbers; None if the set has none.

        Several names of one class, as ImageNet has them, are joined by commas.
        """
        if hasattr(self.dataset, "all_categories"):  # iNaturalist
            return tuple(map(str, self.dataset.all_categories)) if self.dataset.target_type == ["full"] else None
        names = getattr(self.dataset, "classes", None)
        if not isinstance(names, list | tuple) or not names:
            return None
        return tuple(", ".join(map(str, name)) if isinstance(name, tuple | list) else str(name) for name in names)

    @property
    def labels(self) -> Any:
        """Returns the labels of all images, as the set has them; None if the images must be read for that."""
        if hasattr(self.dataset, "all_categories"):
            return [number for number, _ in self.dataset.index] if self.dataset.target_type == ["full"] else None
        names = ("targets", "labels", "_labels")
        found = next((value for name in names if (value := getattr(self.dataset, name, None)) is not None), None)
        if found is not None and getattr(self.dataset, "compat", False):  # QMNIST, whose targets have the writers too
            return np.asarray(found)[:, 0]
        return found
