"""Names of a data set's classes, in the order of their numbers."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch.utils.data import Subset

from vit_tucker.data.datasets import ConvertedDataset, FileDataset

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
    reader = dataset.reader if isinstance(dataset, FileDataset) else getattr(dataset, "reader", None)
    numbers = getattr(reader, "class_to_idx", None)
    if isinstance(numbers, Mapping) and sorted(numbers.values()) == list(range(len(numbers))):
        return tuple(sorted(numbers, key=lambda label: numbers[label]))
    features = getattr(getattr(reader, "dataset", None), "features", None)  # of Hugging Face data sets
    label = features.get(getattr(reader, "label_key", "label")) if isinstance(features, Mapping) else None
    return _texts(getattr(label, "names", None))


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
