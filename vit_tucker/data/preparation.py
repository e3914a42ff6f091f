"""Chooses how the images of a split are read: from memory or from files, transformed anew or once."""

from dataclasses import dataclass
from typing import Any

from vit_tucker.config.schema import DataConfig
from vit_tucker.data.datasets import is_iterable
from vit_tucker.data.memory import is_array
from vit_tucker.errors import ConfigError

LIMIT_BYTES = 2**30
"""``data.in_memory=auto`` keeps no more transformed images; ``true`` has no limit."""


@dataclass(frozen=True)
class Preparation:
    """The way in which the images of a split are read.

    Attributes:
        kind: "image" one by one, "array" from the set's own array, "held" decoded once, "kept" transformed once.
        reason: why one by one; '' otherwise.
    """

    kind: str
    reason: str = ""


def choose_preparation(data: DataConfig, dataset: Any, shape: tuple[int, int, int], training: bool) -> Preparation:
    """Returns the fastest way that the config allows.

    Args:
        data: config section.
        dataset: of the split.
        shape: (channels, height, width) of the transformed images.
        training: with the training transform.

    Raises:
        ConfigError: ``data.in_memory=true`` for a stream.
    """
    wanted = data.in_memory is True
    if data.in_memory is False:
        return Preparation("image", "data.in_memory=false")
    if is_iterable(dataset):
        if wanted:
            raise ConfigError("data.in_memory=true: a streamed data set can't be held in memory; choose auto or false")
        return Preparation("image", "a stream")
    stored = is_array(dataset)
    if not stored and not wanted:
        return Preparation("image", "the images are files; data.in_memory=true would hold them")
    if training and not data.no_aug:
        return Preparation("array" if stored else "held")
    channels, height, width = shape
    size = len(dataset) * channels * height * width
    if size > LIMIT_BYTES and not wanted:
        return Preparation("image", f"{size / 2**30:.1f} GiB of pixels are too many to hold")
    return Preparation("kept")


def describe_preparation(preparation: Preparation, images: int | None, workers: int) -> str:
    """Returns one phrase for the log.

    Args:
        preparation: of the split.
        images: in the split; None for a stream of unknown size.
        workers: loader processes.
    """
    count = "images" if images is None else f"{images:,} images"
    if preparation.kind == "kept":
        return f"{count} in memory, transformed once"
    by = f" by {workers} worker{'s' * (workers != 1)}" if workers else ""
    if preparation.kind in ("array", "held"):
        return f"{count} in memory, augmented one by one{by}"
    return f"{count} read one by one{by}: {preparation.reason}"
