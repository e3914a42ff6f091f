"""Images held in memory: which sets are arrays there already, files decoded once, and fixed transforms done once."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from vit_tucker.data.batches import BadImageError, Sample, SeededDataset, read_image
from vit_tucker.data.datasets import ArrayDataset, image_name
from vit_tucker.data.faults import FaultLog
from vit_tucker.data.sampler import Key
from vit_tucker.data.vision import ConvertedDataset

SAMPLE_BYTES = {"I": 4, "F": 4, "I;16": 2}
"""Bytes of a pixel's channel, of Pillow's modes in which it has more than one."""


def is_array(dataset: Any) -> bool:
    """Returns whether the images of a set lie in memory as one array already."""
    if isinstance(dataset, Subset):
        return is_array(dataset.dataset)
    if isinstance(dataset, ArrayDataset):
        return True
    stored = getattr(dataset.dataset, "data", None) if isinstance(dataset, ConvertedDataset) else None
    return isinstance(stored, np.ndarray | Tensor) and stored.ndim in (3, 4) and str(stored.dtype).endswith("uint8")


def decoded_bytes(dataset: Any, samples: int = 8) -> int | None:
    """Estimates the memory of all decoded images by some of them; None where none of these can be read.

    Args:
        dataset: map-style, yields (PIL image, int).
        samples: how many to decode, at equal distances.
    """
    sizes = []
    for index in sorted({len(dataset) * number // samples for number in range(samples)}):
        with contextlib.suppress(BadImageError, IndexError):
            picture = read_image(dataset, index, "")[0]
            sizes.append(picture.width * picture.height * len(picture.getbands()) * SAMPLE_BYTES.get(picture.mode, 1))
    return len(dataset) * sum(sizes) // len(sizes) if sizes else None


def free_bytes() -> int | None:
    """Returns the memory that is free here, at most what a container's limit allows; None where the system does not say."""
    found = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=None)


def shown_bytes(size: int) -> str:
    """Formats a size: 1.5 * 2**30 -> '1.5 GiB'."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


class HeldImages(Dataset):
    """Decodes all images of a split once and keeps them in memory; a bad one raises its error whenever it is read.

    Args:
        dataset: map-style, yields (PIL image, int).
        split: its name.
        log: for bad images.

    Raises:
        DataError: too many bad images.
    """

    def __init__(self, dataset: Any, split: str, log: FaultLog) -> None:
        self.dataset = dataset
        self.samples: list[tuple[Image.Image, int] | BaseException] = []
        for index in range(len(dataset)):
            try:
                self.samples.append(read_image(dataset, index, split))
            except BadImageError as error:
                log.add([str(error)])
                self.samples.append(error.__cause__ or error)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        sample = self.samples[index]
        if isinstance(sample, BaseException):
            raise sample
        return sample

    def image_name(self, index: int) -> str:
        """Returns the name that the image has in the held set."""
        return image_name(self.dataset, index)


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
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[Key]) -> list[Sample]:
        new = [key for key in keys if key[1] not in self.samples]
        self.samples |= zip((index for _, index, _ in new), self.dataset.__getitems__(new), strict=True)
        return [self.samples[index] for _, index, _ in keys]
