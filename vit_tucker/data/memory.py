"""Small data sets held in memory: training images augmented in batches, fixed transforms done once for each image."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from vit_tucker.config.schema import DataConfig
from vit_tucker.data.augmentation import Parameters, draw_parameters
from vit_tucker.data.batches import BadImageError, Batch, Sample, SeededDataset, read_image
from vit_tucker.data.datasets import ArrayDataset, image_name
from vit_tucker.data.faults import FaultLog
from vit_tucker.data.resample import crop_resize
from vit_tucker.data.sampler import Key
from vit_tucker.data.seeding import derive_seed
from vit_tucker.data.vision import ConvertedDataset
from vit_tucker.errors import ConfigError, DataError


def array_size(dataset: Any) -> tuple[int, int] | None:
    """Returns (height, width) of a set whose images lie in memory as one array already; None for any other."""
    if isinstance(dataset, Subset):
        return array_size(dataset.dataset)
    if isinstance(dataset, ArrayDataset):
        return int(dataset.images.shape[1]), int(dataset.images.shape[2])
    stored = getattr(dataset.dataset, "data", None) if isinstance(dataset, ConvertedDataset) else None
    if (
        not isinstance(stored, np.ndarray | Tensor)
        or stored.ndim not in (3, 4)
        or not str(stored.dtype).endswith("uint8")
    ):
        return None
    channels_first = stored.ndim == 4 and stored.shape[3] > 4  # torchvision's SVHN and STL-10; CIFAR and MNIST are not
    height, width = stored.shape[2:4] if channels_first else stored.shape[1:3]
    return int(height), int(width)


@dataclass(frozen=True)
class HeldImages:
    """All images of a split.

    Attributes:
        pixels: (n, height, channels, width) uint8.
        labels: (n,) int64.
        faults: fault lines of the images that can't be read, by index.
    """

    pixels: Tensor
    labels: Tensor
    faults: dict[int, str]

    def readable(self, index: int) -> int:
        """Returns the next readable image from ``index`` on."""
        while index in self.faults:
            index = (index + 1) % len(self.labels)
        return index


def hold_images(dataset: Any, split: str, log: FaultLog) -> HeldImages:
    """Reads all images of a split.

    Args:
        dataset: map-style, yields (PIL image, int).
        split: its name.
        log: for bad images.

    Raises:
        ConfigError: images of different sizes. DataError: too many bad images, or none that can be read.
    """
    labels = torch.full((len(dataset),), -1)
    faults: dict[int, str] = {}
    pixels: Tensor | None = None
    for index in range(len(dataset)):
        try:
            image, labels[index] = read_image(dataset, index, split)
        except BadImageError as error:
            faults[index] = str(error)
            log.add([str(error)])
            continue
        array = np.array(image)
        rows = torch.from_numpy(array if array.ndim == 3 else array[..., None]).transpose(1, 2)
        if pixels is None:
            pixels = torch.zeros(len(dataset), *rows.shape, dtype=torch.uint8)
        if rows.shape != pixels.shape[1:]:
            height, _, width = pixels.shape[1:]
            raise ConfigError(
                f"data.in_memory=true: all images must be of one size, but {image_name(dataset, index)} of split '{split}' is "
                f"{image.width}x{image.height} pixels, the first one {width}x{height}; choose auto or false"
            )
        pixels[index] = rows
    if pixels is None:
        raise DataError(
            f"none of the {len(dataset)} images of split '{split}' can be read: {next(iter(faults.values()))}"
        )
    return HeldImages(pixels, labels, faults)


class AugmentedBatches(Dataset):
    """Held images with timm's training transform as tensor operations; an item is a batch.

    Each image's random parameters follow from (seed, epoch, index, repeat) alone, and the arithmetic is exact, so that an image
    is the same in any batch and on any number of processes.

    Args:
        held: the images.
        data: config section.
        resolved: timm's data config, see ``resolve_data``.
        seed: of the run.
    """

    def __init__(self, held: HeldImages, data: DataConfig, resolved: dict[str, Any], seed: int) -> None:
        self.held, self.data, self.size = held, data, tuple(resolved["input_size"][1:])
        self.key = derive_seed(seed, 6), derive_seed(seed, 7)
        mean, std = torch.tensor(resolved["mean"]), torch.tensor(resolved["std"])
        self.factor, self.offset = (1 / (255 * std)).view(-1, 1, 1), (-mean / std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.held.labels)

    def __getitem__(self, keys: list[Key]) -> Batch:
        held = self.held
        stored = held.pixels.shape[1], held.pixels.shape[3]
        parameters = draw_parameters(keys, self.key, self.data, stored, self.size)
        indices = torch.tensor([held.readable(index) for _, index, _ in keys])
        faults = tuple(line for _, index, _ in keys if (line := held.faults.get(index)) is not None)
        return Batch(self.transform(held.pixels[indices], parameters), held.labels[indices], faults)

    def transform(self, pixels: Tensor, parameters: Parameters) -> Tensor:
        """Images (B, height, channels, width) uint8 -> (B, channels, *size) float32, normalised."""
        images = torch.empty(len(pixels), pixels.shape[2], *self.size)
        for cubic in (False, True):
            rows = np.flatnonzero(parameters.bicubic == cubic)
            if len(rows) == 0:
                continue
            boxes, hflip, vflip = parameters.boxes[rows], parameters.hflip[rows], parameters.vflip[rows]
            for first, last, values in crop_resize(pixels[rows], boxes, self.size, hflip, vflip, cubic):
                images[rows[first:last]] = (values * self.factor).add_(self.offset)
        for image, erased, seed in zip(images, parameters.erased, parameters.noise.tolist(), strict=True):
            if erased:
                erase(image, erased, self.data.remode, seed)
        return images


def erase(image: Tensor, boxes: list[tuple[int, int, int, int]], mode: str, seed: int) -> None:
    """Fills boxes of a normalised image (channels, height, width) in place, with zeros or noise as timm's RandomErasing."""
    generator = torch.Generator().manual_seed(seed)
    for top, left, height, width in boxes:
        box = image[:, top : top + height, left : left + width]
        if mode == "const":
            box.zero_()
        else:
            shape = box.shape if mode == "pixel" else (len(image), 1, 1)
            box.copy_(torch.randn(shape, generator=generator))


def as_it_is(batch: Batch) -> Batch:
    """Returns what is a batch already; a function of the module, so that it can be sent to worker processes."""
    return batch


class KeptSamples(Dataset):
    """Transforms each image once and returns the same sample from then on.

    To be read in one process, since each would hold samples of its own.

    Args:
        dataset: with a transform without randomness, of 8-bit results.
    """

    def __init__(self, dataset: SeededDataset) -> None:
        self.dataset, self.samples = dataset, dict[int, Sample]()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Sample:
        _, index, _ = key
        if index not in self.samples:
            self.samples[index] = self.dataset[key]
        return self.samples[index]
