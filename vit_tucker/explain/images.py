"""Images to explain: files, folders of them, or the first ones of a run's evaluation images."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vit_tucker.config.schema import DataConfig
from vit_tucker.data.batches import BadImageError, read_image
from vit_tucker.data.datasets import image_name, is_iterable
from vit_tucker.data.image_files import AS_STORED, ImageOptions, list_images, read_image_file
from vit_tucker.data.splits import open_split
from vit_tucker.errors import DataError

MAX_STEM = 200
"""Bytes of an image's name that the names of its pictures begin with; file systems take 255."""


@dataclass(frozen=True)
class NamedImage:
    """An image that can be read.

    Attributes:
        name: of the files made from it; different for all images of a command.
        source: where it comes from, for people.
        read: reads it.
        label: number of its true class; None if unknown.
    """

    name: str
    source: str
    read: Callable[[], Image.Image]
    label: int | None = None


def images_in_files(paths: Sequence[Path], mode: str, options: ImageOptions = AS_STORED) -> list[NamedImage]:
    """Lists the images of files and folders, those of folders in the order of their names; all are read once, to be sure.

    Args:
        paths: files, and folders with images in them.
        mode, options: how the files are read, see ``read_image_file``.

    Raises:
        DataError: a path that is missing, a folder without images, or a file that can't be read.
    """
    files = list_images(paths)
    for file in files:
        read_image_file(file, mode, options)
    return named_apart(
        [NamedImage(file.stem, str(file), partial(read_image_file, file, mode, options)) for file in files]
    )


def named_apart(images: Sequence[NamedImage]) -> list[NamedImage]:
    """Returns the images, those whose name came before with a number: 'cat', 'cat-2'."""
    taken: dict[str, NamedImage] = {}
    for image in images:
        name = image.name
        while len(os.fsencode(name)) > MAX_STEM:
            name = name[:-1]
        count, free = 1, name
        while free in taken:
            count += 1
            free = f"{name}-{count}"
        taken[free] = replace(image, name=free)
    return list(taken.values())


def data_images(data: DataConfig, count: int, mode: str, classes: Sequence[str] | None = None) -> list[NamedImage]:
    """Returns the first evaluation images of a data set.

    Args:
        data: section of a config.
        count: how many.
        mode: of PIL, "L" or "RGB".
        classes: class map of the labels: names in the order of their numbers; the training split's if None.

    Raises:
        DataError: the data set is missing, only streams, or has fewer images.
    """
    dataset = open_split(data, data.val_split, False, 1 if mode == "L" else 3, classes=classes)
    if is_iterable(dataset):
        raise DataError(f"--data: {data.dataset} only streams; name image files")
    if not 1 <= count <= len(dataset):
        raise DataError(f"--data {count}: the evaluation split of {data.dataset} has {len(dataset)} images")
    images = []
    for index in range(count):
        try:
            label = read_image(dataset, index, data.val_split)[1]
        except BadImageError as error:
            raise DataError(f"--data: {error}") from None
        source = f"{data.dataset} {data.val_split}: {image_name(dataset, index)}"
        read = partial(_read, dataset, index, data.val_split)
        images.append(NamedImage(f"{data.val_split}-{index:04d}", source, read, label if label >= 0 else None))
    return images


def _read(dataset: object, index: int, split: str) -> Image.Image:
    return read_image(dataset, index, split)[0]


def to_pixels(image: Image.Image, transform: Callable[[Image.Image], object]) -> Tensor:
    """Returns what the model sees, before normalisation: (channels, height, width), uint8."""
    pixels = torch.tensor(np.asarray(transform(image)))
    return pixels if pixels.ndim == 3 else pixels[None]


def to_picture(pixels: Tensor) -> np.ndarray:
    """Returns (channels, height, width) as (height, width, 3) to look at; grey in three equal channels."""
    shown = pixels if len(pixels) == 3 else pixels[:1].expand(3, -1, -1)
    return shown.permute(1, 2, 0).numpy()
