"""Chooses how the images of a split are read: from memory or from files, transformed anew or once."""

import os
from dataclasses import dataclass
from typing import Any

from vit_tucker.config.schema import DataConfig
from vit_tucker.data.datasets import is_iterable
from vit_tucker.data.memory import decoded_bytes, free_bytes, is_array, shown_bytes
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
        ConfigError: ``data.in_memory=true`` for a stream, or for more images than fit into memory.
    """
    wanted = data.in_memory is True
    if data.in_memory is False:
        return Preparation("image", "data.in_memory=false")
    if is_iterable(dataset):
        if wanted:
            raise ConfigError("data.in_memory=true: a streamed data set can't be held in memory; choose auto or false")
        return Preparation("image", "a stream")
    stored, keep = is_array(dataset), not training or data.no_aug
    channels, height, width = shape
    size = len(dataset) * channels * height * width
    if not stored:
        held = size if keep else decoded_bytes(dataset)
        if not wanted:
            return Preparation("image", f"the images are files{advice(held)}")
        refuse_too_many(held, len(dataset))
    if not keep:
        return Preparation("array" if stored else "held")
    if size > LIMIT_BYTES and not wanted:
        return Preparation("image", f"{size / 2**30:.1f} GiB of pixels are too many to keep in memory")
    return Preparation("kept")


def advice(size: int | None) -> str:
    """Returns whether images would fit into memory, for the log; '' where that is not known."""
    free = free_bytes()
    if size is None:
        return ""
    if free is not None and size * local_processes() > free // 2:
        return f", about {shown_bytes(size)} of pixels"
    return f"; data.in_memory=true would hold them in about {shown_bytes(size)}"


def refuse_too_many(size: int | None, images: int) -> None:
    """Raises ConfigError if images can't fit into the memory that is free."""
    free, processes = free_bytes(), local_processes()
    if size is not None and free is not None and size * processes > free:
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise ConfigError(
            f"data.in_memory=true: {images:,} images are about {shown_bytes(size)} of pixels{each}, and {shown_bytes(free)} are "
            "free: choose auto or false, or store smaller images"
        )


def local_processes() -> int:
    """Returns the number of training processes of this machine, each of which holds images of its own."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


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
