"""Labels of a data set: what its classes are called, and whether the model has them all."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Subset

from vit_tucker.data.classes import refuse_label
from vit_tucker.data.datasets import ArrayDataset, ConvertedDataset, FileDataset, image_name
from vit_tucker.data.folders import FolderDataset

FASHION_MNIST = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
OWN = {"digits": tuple("0123456789"), "fashion_mnist": FASHION_MNIST}


def label_names(name: str, dataset: Any) -> tuple[str, ...] | None:
    """Names of the classes of an opened data set; None if it doesn't tell.

    Args:
        name: see ``DataConfig.dataset``.
        dataset: as ``load_dataset`` opens it.
    """
    if name in OWN:
        return OWN[name]
    if isinstance(dataset, Subset):
        return label_names(name, dataset.dataset)
    if isinstance(dataset, ConvertedDataset):  # of torchvision
        return _texts(getattr(dataset.dataset, "classes", None))
    if isinstance(dataset, FolderDataset):
        return dataset.classes
    reader = dataset.reader if isinstance(dataset, FileDataset) else getattr(dataset, "reader", None)
    numbers = getattr(reader, "class_to_idx", None)
    if isinstance(numbers, Mapping) and sorted(numbers.values()) == list(range(len(numbers))):
        return tuple(sorted(numbers, key=lambda label: numbers[label]))
    features = getattr(getattr(reader, "dataset", None), "features", None)  # of Hugging Face data sets
    label = features.get(getattr(reader, "label_key", "label")) if isinstance(features, Mapping) else None
    return _texts(getattr(label, "names", None))


def labels_of(dataset: Any) -> np.ndarray | None:
    """Returns the labels of all images without decoding any, (n,) int64; None if that can't be, as for streams.

    Args:
        dataset: as ``open_split`` returns it, or a subset of it.
    """
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return None if labels is None else labels[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ArrayDataset | FolderDataset):
        return np.asarray(dataset.labels).astype(np.int64)
    found: Any = None
    if isinstance(dataset, ConvertedDataset):  # of torchvision
        names = ("targets", "labels", "_labels")
        found = next((value for name in names if (value := getattr(dataset.dataset, name, None)) is not None), None)
    elif isinstance(dataset, FileDataset) and dataset.target_transform is None:
        found = _column(dataset.reader)
    if found is None:
        return None
    try:
        labels = np.asarray(found)
    except ValueError:  # of several labels for each image
        return None
    fits = labels.shape == (len(dataset),) and np.issubdtype(labels.dtype, np.integer)
    return labels.astype(np.int64) if fits else None


def _column(reader: Any) -> Any:
    """Returns the column of labels of timm's reader of Hugging Face data sets; None for others, and for labels that it maps."""
    table, key = getattr(reader, "dataset", None), getattr(reader, "label_key", None)
    if (
        table is None
        or getattr(reader, "remap_class", False)
        or key not in (getattr(table, "column_names", None) or ())
    ):
        return None
    return list(table.select_columns([key])[:][key])


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


def _texts(names: Any) -> tuple[str, ...] | None:
    return tuple(map(str, names)) if isinstance(names, Sequence) and not isinstance(names, str) and names else None


@lru_cache
def imagenet_names(subset: str = "imagenet-1k") -> tuple[str, ...]:
    """Short descriptions of ImageNet's classes, by class number, from timm."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))


@lru_cache
def synset_names(subset: str = "imagenet-1k") -> dict[str, str]:
    """Short descriptions of ImageNet's classes, by the synsets that name the data set's folders, from timm."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo(subset)
    return {
        str(info.index_to_label_name(index)): info.index_to_description(index) for index in range(info.num_classes())
    }
