"""Images for activation-aware conversions: some of the training set, as the evaluation sees them, without labels."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from vit_tucker.config.schema import DataConfig
from vit_tucker.data.batches import BadImageError, read_image
from vit_tucker.data.datasets import is_iterable, subset
from vit_tucker.data.faults import FaultLog
from vit_tucker.data.seeding import derive_seed
from vit_tucker.data.splits import open_split
from vit_tucker.data.streams import StreamReader
from vit_tucker.data.transforms import eval_transform
from vit_tucker.errors import DataError


def calibration_images(
    data: DataConfig, resolved: dict[str, Any], images: int, batch_size: int, seed: int
) -> Iterator[Tensor]:
    """Batches of training images with the evaluation's transform; the same ones in every process.

    Args:
        data: config section; ``num_samples`` holds here too.
        resolved: timm's data config, see ``resolve_data``.
        images: how many, drawn without replacement by ``seed``; the first ones of a streamed set.
        batch_size: images per batch.
        seed: of the choice.

    Yields:
        (B, channels, height, width), float32.

    Raises:
        DataError: the split is missing, has fewer images, or more bad ones than ``data.max_bad_images``.
    """
    split = open_split(data, data.train_split, False, resolved["input_size"][0], batch_size=batch_size)
    split = subset(split, data.num_samples)
    if is_iterable(split):
        samples: Iterable[Any] = itertools.islice(
            StreamReader(split, data.train_split, data.max_bad_images).read(), images
        )
    else:
        if images > len(split):
            raise DataError(f"attention.calibration.images={images}: the training split has {len(split)} images")
        generator = torch.Generator().manual_seed(derive_seed(seed, len(split)))
        order = torch.randperm(len(split), generator=generator).tolist()
        samples = readable_images(split, order, images, data)
    transform = eval_transform(resolved)
    batch: list[Tensor] = []
    for image, _ in samples:
        batch.append(transform(image))
        if len(batch) == batch_size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def readable_images(split: Any, order: list[int], count: int, data: DataConfig) -> Iterator[tuple[Any, int]]:
    """The first ``count`` readable images in an order of indices."""
    faults, found = FaultLog(data.max_bad_images), 0
    for index in order:
        if found == count:
            return
        try:
            sample = read_image(split, index, data.train_split)
        except BadImageError as error:
            faults.add([str(error)])
            continue
        found += 1
        yield sample
