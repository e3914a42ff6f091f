"""How the images of a split are read: held in memory and augmented in batches, or read and transformed one by one."""

from dataclasses import dataclass
from typing import Any

from vit_tucker.config.schema import DataConfig
from vit_tucker.data.datasets import is_iterable
from vit_tucker.data.memory import array_size
from vit_tucker.errors import ConfigError

LIMIT_BYTES = 2**30
"""``data.in_memory=auto`` holds no more; ``true`` has no limit."""
BATCHED_INTERPOLATIONS = (None, "bilinear", "bicubic", "random")


@dataclass(frozen=True)
class Preparation:
    """How the images of a split are read.

    Attributes:
        kind: "image" one by one, "augmented" held and augmented in batches, "kept" transformed once and kept.
        reason: why one by one; '' otherwise.
    """

    kind: str
    reason: str = ""


def batched_obstacle(data: DataConfig) -> str | None:
    """Returns the key of what in the training transform works on single PIL images only; None if nothing does."""
    if data.no_aug:
        return None
    if data.aa:
        return "data.aa"
    if data.color_jitter:
        return "data.color_jitter"
    if data.train_crop_mode not in (None, "rrc"):
        return f"data.train_crop_mode={data.train_crop_mode}"
    if data.interpolation not in BATCHED_INTERPOLATIONS:
        return f"data.interpolation={data.interpolation}"
    return None


def choose_preparation(data: DataConfig, dataset: Any, shape: tuple[int, int, int], training: bool) -> Preparation:
    """Returns the fastest preparation that the config allows.

    Args:
        data: config section.
        dataset: of the split.
        shape: (channels, height, width) of the transformed images.
        training: with the training transform.

    Raises:
        ConfigError: ``data.in_memory=true`` where that can't be.
    """
    wanted = data.in_memory is True
    if data.in_memory is False:
        return Preparation("image", "data.in_memory=false")
    if is_iterable(dataset):
        if wanted:
            raise ConfigError("data.in_memory=true: a streamed data set can't be held in memory; choose auto or false")
        return Preparation("image", "a stream")
    if training and (obstacle := batched_obstacle(data)) is not None:
        if wanted:
            raise ConfigError(
                f"data.in_memory=true: {obstacle} needs single PIL images; leave it out, or choose data.in_memory=auto"
            )
        return Preparation("image", f"{obstacle} needs PIL")
    kind = "augmented" if training and not data.no_aug else "kept"
    if wanted:
        return Preparation(kind)
    stored = array_size(dataset)
    if stored is None:
        return Preparation("image", "the images are files; data.in_memory=true would hold them")
    height, width = stored if kind == "augmented" else shape[1:]
    size = len(dataset) * shape[0] * height * width
    if size > LIMIT_BYTES:
        return Preparation("image", f"{size / 2**30:.1f} GiB of pixels are too many to hold")
    return Preparation(kind)


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
    if preparation.kind == "augmented":
        return f"{count} in memory, augmented in batches{by}"
    return f"{count} read one by one{by}: {preparation.reason}"
