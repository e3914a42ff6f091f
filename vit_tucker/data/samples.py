"""Images to try a model on, as the evaluation sees them: some of a data set's evaluation split, or files and folders."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_tucker.config.schema import DataConfig
from vit_tucker.data.calibration import readable_images
from vit_tucker.data.datasets import is_iterable
from vit_tucker.data.image_files import AS_STORED, ImageOptions, list_images, read_image_file
from vit_tucker.data.splits import open_split
from vit_tucker.data.streams import StreamReader
from vit_tucker.data.transforms import eval_transform

Labelled = tuple[Tensor, Tensor | None]
"""Images (B, channels, height, width), float32, normalised; labels (B,) or None."""


def evaluation_images(
    data: DataConfig, resolved: dict[str, Any], images: int, batch_size: int, classes: Sequence[str] | None = None
) -> Iterator[Labelled]:
    """Batches of the evaluation split: a fixed sample of it, since folders come sorted by class.

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
    if is_iterable(split):
        samples: Iterable[Any] = itertools.islice(
            StreamReader(split, data.val_split, data.max_bad_images).read(), images
        )
    else:
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0)).tolist()
        samples = readable_images(split, order, min(images, len(order)), data)
    return in_batches(samples, resolved, batch_size)


def file_images(
    paths: Sequence[Path],
    resolved: dict[str, Any],
    images: int,
    batch_size: int,
    options: ImageOptions = AS_STORED,
) -> Iterator[Labelled]:
    """Batches of image files; folders are searched through. No labels.

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
    mode = "L" if resolved["input_size"][0] == 1 else "RGB"
    return in_batches(((read_image_file(file, mode, options), None) for file in chosen), resolved, batch_size)


def in_batches(samples: Iterable[tuple[Any, int | None]], resolved: dict[str, Any], size: int) -> Iterator[Labelled]:
    """PIL images with labels (or None), transformed and stacked."""
    transform, rest = eval_transform(resolved), iter(samples)
    while batch := list(itertools.islice(rest, size)):
        labels = [label for _, label in batch]
        known = None if labels[0] is None else torch.tensor(labels)
        yield torch.stack([transform(image) for image, _ in batch]), known
