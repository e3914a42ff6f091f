"""Labels of a data set: what its classes are called, and whether the model has them all."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Subset

from vit_tucker.data.classes import refuse_label
from vit_tucker.data.datasets import image_name


def class_names(dataset: Any) -> tuple[str, ...] | None:
    """Returns the names of the classes of an opened split, in the order of their numbers; None if it has none.

    Args:
        dataset: as ``open_split`` returns it, or a subset of it.
    """
    if isinstance(dataset, Subset):
        return class_names(dataset.dataset)
    if hasattr(dataset, "class_names"):
        return dataset.class_names
    numbers = getattr(getattr(dataset, "reader", None), "class_to_idx", None)  # of TFDS
    if isinstance(numbers, Mapping) and sorted(numbers.values()) == list(range(len(numbers))):
        return tuple(sorted(numbers, key=lambda label: numbers[label]))
    return None


def labels_of(dataset: Any) -> np.ndarray | None:
    """Returns the labels of all images without decoding any, (n,) int64; None if that can't be, as for streams.

    Args:
        dataset: as ``open_split`` returns it, or a subset of it.
    """
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return None if labels is None else labels[np.asarray(dataset.indices, dtype=np.int64)]
    found = getattr(dataset, "labels", None)
    if found is None:
        return None
    try:
        labels = np.asarray(found)
    except ValueError:  # of several labels for each image
        return None
    fits = labels.shape == (len(dataset),) and np.issubdtype(labels.dtype, np.integer)
    return labels.astype(np.int64) if fits else None


def check_labels(dataset: Any, num_classes: int, split: str) -> None:
    """Raises DataError if an image has a label that is none of the model's classes; looks at no pixels.

    Args:
        dataset: as ``open_split`` returns it, or a subset of it; a stream's labels are checked as they are read.
        num_classes: of the model.
        split: name of the split.
    """
    labels = labels_of(dataset)
    if labels is None:
        return
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        refuse_label(int(labels[wrong[0]]), num_classes, split, image_name(dataset, int(wrong[0])))


@lru_cache
def imagenet_names(subset: str = "imagenet-1k") -> tuple[str, ...]:
    """Returns short descriptions of ImageNet's classes, by class number, from timm."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))


@lru_cache
def synset_names(subset: str = "imagenet-1k") -> dict[str, str]:
    """Returns short descriptions of ImageNet's classes, by the synsets that name the data set's folders, from timm."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo(subset)
    return {
        str(info.index_to_label_name(index)): info.index_to_description(index) for index in range(info.num_classes())
    }
