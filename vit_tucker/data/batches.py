"""Turns images into batches: reading, bad images, seeded transforms, collating."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from vit_tucker.data.datasets import image_name
from vit_tucker.data.faults import FaultLog, fault_line
from vit_tucker.data.sampler import Key
from vit_tucker.data.seeding import derive_seed, restored_generators, seed_transforms
from vit_tucker.data.workers import end_workers
from vit_tucker.errors import DataError


class Batch(NamedTuple):
    """A batch of images with their labels, or of windows of tokens with those that follow.

    Attributes:
        images: (B, channels, height, width), normalised float32; from workers also uint8, see ``Normalise``;
            or tokens (B, N) int64.
        labels: (B,) int64; of tokens (B, N).
        faults: one line for each image that could not be read on the way to this batch.
    """

    images: Tensor
    labels: Tensor
    faults: tuple[str, ...] = ()


class Batches(Protocol):
    """Yields the evaluation batches of one process."""

    @property
    def description(self) -> str:
        """Returns one line for the log: how they are read, and why."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...

    def close(self) -> None:
        """Ends all worker processes now."""


class StepBatches(Protocol):
    """Yields the training batches of one process, grouped into optimizer steps.

    Attributes:
        steps_per_epoch: optimizer steps per epoch.
    """

    @property
    def description(self) -> str:
        """Returns one line for the log: how they are read, and why."""

    @property
    def num_samples(self) -> int:
        """Returns how many images, or tokens, the training split has."""

    steps_per_epoch: int

    def steps(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """Yields each optimizer step's micro-batches, from ``start_step`` of an epoch on."""

    def close(self) -> None:
        """Ends all worker processes now."""


class Sample(NamedTuple):
    """One transformed image, or none where it could not be read."""

    image: Tensor | None
    label: int
    faults: tuple[str, ...] = ()


class BadImageError(DataError):
    """An image that can't be read; the message is its fault line."""


def read_image(dataset: Any, index: int, split: str) -> tuple[Image.Image, int]:
    """Reads one image and its label from a map-style data set.

    Args:
        dataset: ``dataset[index]`` is (PIL image, label).
        index: of the image, from 0.
        split: name of the split, for messages.

    Raises:
        BadImageError: it can't be read, for whatever reason its reader gives.
    """
    try:
        image, label = dataset[index]
        return image, int(label)
    except MemoryError:
        raise
    except Exception as error:  # readers and decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise BadImageError(fault_line(image_name(dataset, index), split, error)) from error


class SeededDataset(Dataset):
    """A data set with a transform whose randomness depends on (seed, epoch, index, repeat) alone.

    Loaders read whole batches, which leaves the global random generators as they were; a single image leaves them seeded by it.

    Args:
        dataset: map-style, yields (PIL image, int).
        transform: PIL image -> tensor; draws from Python's, NumPy's and torch's global generators.
        seed: of the run.
        split: its name, for bad images.
        replace: take the next readable image in the place of a bad one (training); else leave it out.
        limit: bad images in a row before the search for a replacement ends; the run stops then.
    """

    def __init__(
        self, dataset: Any, transform: Callable[[Any], Any], seed: int, split: str, replace: bool, limit: int = 0
    ) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.split, self.replace, self.limit = split, replace, limit

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[Key]) -> list[Sample]:
        with restored_generators():
            return [self[key] for key in keys]

    def __getitem__(self, key: Key) -> Sample:
        epoch, index, repeat = key
        faults: list[str] = []
        for offset in range(len(self.dataset)):
            try:
                image, label = read_image(self.dataset, (index + offset) % len(self.dataset), self.split)
            except BadImageError as error:
                faults.append(str(error))
                if not self.replace or len(faults) > self.limit:
                    return Sample(None, -1, tuple(faults))
                continue
            seed_transforms(augmentation_seed(self.seed, epoch, index, repeat))  # every step seeds anew after it
            return Sample(self.transform(image), label, tuple(faults))
        raise DataError(f"none of the {len(self.dataset)} images of split '{self.split}' can be read: {faults[0]}")


def augmentation_seed(seed: int, epoch: int, index: int, repeat: int) -> int:
    """Returns the seed of one augmentation; the first one of an image is that of a run without repeated augmentation.

    Args:
        seed: of the run.
        epoch, index: number of the epoch and of the image, from 0.
        repeat: number of the augmentation of this image in the epoch, from 0.
    """
    return derive_seed(seed, epoch, 1, index, *([repeat] if repeat else []))


def collate(samples: list[Sample], shape: tuple[int, int, int]) -> Batch:
    """Returns samples as a batch, without the bad ones and so perhaps empty.

    Args:
        samples: of one batch.
        shape: (channels, height, width) of the images.
    """
    good = [(sample.image, sample.label) for sample in samples if sample.image is not None]
    faults = tuple(line for sample in samples for line in sample.faults)
    if not good:
        return Batch(torch.empty(0, *shape), torch.empty(0, dtype=torch.int64), faults)
    images, labels = default_collate(good)  # in a worker it collates into shared memory
    return Batch(images, labels, faults)


class Normalise:
    """Images as the model needs them, on its device; 8-bit ones, a quarter of the bytes to copy, are normalised there.

    Args:
        mean, std: of each channel, in [0, 1].
        device: of the model.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.mean, self.std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        """Returns float32 images for uint8 or float32 ones of (B, channels, height, width)."""
        images = images.to(self.device, non_blocking=True)
        if images.dtype != torch.uint8:
            return images
        images = images.to(torch.float32)
        return images.div_(255).sub_(self.mean).div_(self.std)  # torchvision's own steps, so bit-equal


def checked_batches(loader: Iterable[Any], faults: FaultLog, normalise: Normalise) -> Iterator[Batch]:
    """Yields the loader's batches, normalised, and logs their bad images; a worker's DataError is raised as its one line.

    Args:
        loader: yields images (B, channels, height, width), labels (B,) and lines about bad images.
        faults: where bad images are counted.
        normalise: moves images to the model's device.

    Raises:
        DataError: too many bad images; or what a worker raised.
    """
    try:
        for images, labels, lines in loader:
            faults.add(lines)
            images, labels = normalise(images), labels.to(normalise.device, non_blocking=True)
            yield Batch(images, labels, tuple(lines))  # pinning makes a list of the tuple
    except Exception as error:
        end_workers(loader)
        if not isinstance(error, DataError):
            raise  # torch puts a worker's whole traceback into the message, which is right for what is not the data's fault
        lines = [line for line in str(error.args[0]).splitlines() if line.strip()]
        if len(lines) < 2:
            raise
        raise DataError(lines[-1].partition("Error: ")[2] or lines[-1]) from None
