"""Reads some images as the evaluation sees them, from a data set or from files, for calibration, comparison and explanation."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_tucker.config.schema import DataConfig
from vit_tucker.data.batches import BadImageError, read_image
from vit_tucker.data.datasets import is_iterable, subset
from vit_tucker.data.faults import FaultLog
from vit_tucker.data.image_files import AS_STORED, ImageOptions, image_mode, list_images, read_image_file
from vit_tucker.data.seeding import derive_seed
from vit_tucker.data.splits import open_split
from vit_tucker.data.streams import StreamReader
from vit_tucker.data.transforms import eval_transform
from vit_tucker.errors import DataError

Labelled = tuple[Tensor, Tensor | None]
"""Images (B, channels, height, width), float32, normalised; labels (B,) or None."""


def evaluation_images(
    data: DataConfig, resolved: dict[str, Any], images: int, batch_size: int, classes: Sequence[str] | None = None
) -> Iterator[Labelled]:
    """Returns batches of the evaluation split: a fixed sample of it, since folders come sorted by class.

    Args:
        data: config section.
        resolved: timm's data config, see ``resolve_data``.
        images: how many, at most; the first ones of a streamed set.
        batch_size: images per batch; the last one may be smaller.
        classes: class map of the labels: names in the order of their numbers; the training split's if None.

    Raises:
        DataError: the split is missing, or has more bad images than ``data.max_bad_images``.
    """
    channels = resolved["input_size"][0]
    split = open_split(data, data.val_split, False, channels, classes=classes, batch_size=batch_size)
    samples = readable_images(split, data.val_split, images, 0, data.max_bad_images)
    return in_batches(samples, resolved, batch_size)


def calibration_images(
    data: DataConfig, resolved: dict[str, Any], images: int, batch_size: int, seed: int
) -> Iterator[Tensor]:
    """Yields batches (B, channels, height, width) of training images with the evaluation's transform, alike in every process.

    Args:
        data: config section; ``num_samples`` holds here too.
        resolved: timm's data config, see ``resolve_data``.
        images: how many, drawn without replacement by ``seed``; the first ones of a streamed set.
        batch_size: images per batch.
        seed: of the choice.

    Raises:
        DataError: the split is missing, has fewer images, or more bad ones than ``data.max_bad_images``.
    """
    channels = resolved["input_size"][0]
    split = subset(open_split(data, data.train_split, False, channels, batch_size=batch_size), data.num_samples)
    if not is_iterable(split):
        if images > len(split):
            raise DataError(f"attention.calibration.images={images}: the training split has {len(split)} images")
        seed = derive_seed(seed, len(split))
    samples = readable_images(split, data.train_split, images, seed, data.max_bad_images)
    for batch, _ in in_batches(samples, resolved, batch_size):
        yield batch


def readable_images(dataset: Any, split: str, count: int, seed: int, limit: int) -> Iterator[tuple[Any, int]]:
    """Yields readable images, drawn without replacement; the first ones of a streamed set.

    Args:
        dataset: as ``open_split`` returns it.
        split: its name.
        count: how many, at most.
        seed: of the order.
        limit: bad images that may be passed over.

    Raises:
        DataError: more bad ones.
    """
    if is_iterable(dataset):
        yield from itertools.islice(StreamReader(dataset, split, limit).read(), count)
        return
    faults = FaultLog(limit)
    for index in torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist():
        if count == 0:
            return
        try:
            sample = read_image(dataset, index, split)
        except BadImageError as error:
            faults.add([str(error)])
            continue
        count -= 1
        yield sample


def file_images(
    paths: Sequence[Path],
    resolved: dict[str, Any],
    images: int,
    batch_size: int,
    options: ImageOptions = AS_STORED,
) -> Iterator[Labelled]:
    """Returns batches of image files; folders are searched through. No labels.

    Args:
        paths: files and folders.
        resolved: timm's data config.
        images: how many, at most; of folders with more, evenly spread over their sorted names.
        batch_size: images per batch.
        options: how the files are read.

    Raises:
        DataError: no such file, a folder without images, or a file that is no image.
    """
    files = list_images(paths)
    chosen = [files[i * len(files) // images] for i in range(images)] if len(files) > images else files
    mode = image_mode(resolved["input_size"][0])
    return in_batches(((read_image_file(file, mode, options), None) for file in chosen), resolved, batch_size)


def in_batches(samples: Iterable[tuple[Any, int | None]], resolved: dict[str, Any], size: int) -> Iterator[Labelled]:
    """Yields images with labels (or None), transformed and stacked to (B, channels, height, width).

    Args:
        samples: PIL images with labels, or None in place of all labels.
        resolved: timm's data config, see ``resolve_data``.
        size: images of a batch, B.
    """
    transform, rest = eval_transform(resolved), iter(samples)
    while batch := list(itertools.islice(rest, size)):
        labels = [label for _, label in batch]
        known = None if labels[0] is None else torch.tensor(labels)
        yield torch.stack([transform(image) for image, _ in batch]), known
