"""Data sets by name: the embedded digits, Fashion-MNIST, CIFAR, ImageNet folders, and all that timm.data's factory reads.

A map-style data set yields (PIL image, int label); transforms are applied later (loaders.py).
"""

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision import datasets as tv

from vit_tucker.config.data_section import TOKENS
from vit_tucker.data.folders import is_folder_set
from vit_tucker.data.idx import read_idx
from vit_tucker.data.naming import TRAIN_SPLITS, VALIDATION_SPLITS
from vit_tucker.data.split_source import SplitSource
from vit_tucker.data.vision import ConvertedDataset, open_vision
from vit_tucker.errors import DataError, nearest

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
DEFAULT_ROOT = Path("data")
FASHION_MNIST = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
EVAL_SPLITS = (*VALIDATION_SPLITS, "test")
DIGITS_TEST_SHARE = 0.2
DIGITS_SPLIT_SEED = 0


@dataclass(frozen=True)
class DatasetInfo:
    """Facts that configs need not repeat.

    Attributes:
        num_classes: number of classes; None if it is known from the files only.
        in_chans: channels of the stored images.
        mean, std: of the training images, per channel, in [0, 1]; None: the model's own normalisation.
        num_train: images of the training split; None if it is known from the files only.
    """

    num_classes: int | None
    in_chans: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    num_train: int | None = None


INFO = {
    "digits": DatasetInfo(10, 1, (0.3055,), (0.3760,), 1437),
    "fashion_mnist": DatasetInfo(10, 1, (0.2860,), (0.3530,), 60_000),
    "cifar10": DatasetInfo(10, 3, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 50_000),
    "cifar100": DatasetInfo(100, 3, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 50_000),
    "imagenet": DatasetInfo(1000, num_train=1_281_167),
}
FACTORY_PREFIXES = ("wds", "hfds", "hfids", "tfds", "torch")


def dataset_info(name: str) -> DatasetInfo:
    """Returns facts about a data set; only 3 channels are known of one that timm's factory reads.

    Raises:
        DataError: a name that neither we nor timm's factory know.
    """
    if name in INFO:
        return INFO[name]
    if is_folder_set(name) or name.partition("/")[0].lower() in FACTORY_PREFIXES:
        return DatasetInfo(None)
    if name == TOKENS:
        raise DataError("data.dataset=tokens: text for `train` and `perplexity` of language models, no images")
    known = [*INFO, "folder", *(f"{prefix}/..." for prefix in FACTORY_PREFIXES)]
    raise DataError(f"data.dataset: unknown data set '{name}', known: {', '.join(known)}{nearest(name, INFO)}")


class ArrayDataset(Dataset):
    """Images of one channel held in memory as an array.

    Args:
        images: (n, height, width) uint8.
        labels: (n,) integers.
        mode: PIL mode of the returned images, "L" or "RGB".
        class_names: in the order of their numbers; None if unknown.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, mode: str, class_names: tuple[str, ...] | None = None
    ) -> None:
        self.images, self.labels, self.mode, self.class_names = images, labels, mode, class_names

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert(self.mode), int(self.labels[index])


def image_name(dataset: Any, index: int) -> str:
    """Returns the path of an image where the data set has one, else "image 17", counted in the whole split."""
    if isinstance(dataset, Subset):
        return image_name(dataset.dataset, dataset.indices[index])
    path: Any = None
    if hasattr(dataset, "image_name"):
        with contextlib.suppress(Exception):  # what is to be named is an error already
            path = dataset.image_name(index)
    return str(path) if path else f"image {index}"


def load_digits(train: bool, mode: str) -> ArrayDataset:
    """Returns scikit-learn's digits (1,797 images of 8x8 pixels, UCI ML), in a fixed stratified split, 20% for evaluation."""
    from sklearn.model_selection import train_test_split

    images, target = _read_digits()
    train_index, test_index = train_test_split(
        np.arange(len(images)), test_size=DIGITS_TEST_SHARE, stratify=target, random_state=DIGITS_SPLIT_SEED
    )
    index = np.sort(train_index if train else test_index)
    return ArrayDataset(images[index], target[index], mode, tuple("0123456789"))


@functools.cache
def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Reads images and labels, once in a process: they are stored as text, which takes a tenth of a second to parse."""
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    return np.round(bunch.images * (255 / 16)).astype(np.uint8), bunch.target


def load_fashion_mnist(train: bool, mode: str, root: Path, download: bool) -> ArrayDataset:
    """Reads Fashion-MNIST (70,000 images of 28x28) in torchvision's layout; raises DataError if it is missing or damaged.

    The Debian package's folder is read only if ``root`` is the default, never in place of a folder that the user names.

    Args:
        train: the 60,000 training images, else the 10,000 test images.
        mode: PIL's mode of the images, "L" or "RGB".
        root: folder that it lies in.
        download: get it first.
    """
    if download:
        try:
            tv.FashionMNIST(str(root), train=train, download=True)
        except (RuntimeError, OSError) as error:
            raise DataError(f"Fashion-MNIST can't be downloaded to {root}: {error}") from None
    own = root.name == DEFAULT_ROOT.name  # a run that goes on elsewhere names it in full
    folders = [root / "FashionMNIST" / "raw", root / "fashion_mnist", root, *([DEBIAN_FASHION_MNIST] if own else [])]
    prefix = "train" if train else "t10k"
    for folder in folders:
        for suffix in ("", ".gz"):
            images = folder / f"{prefix}-images-idx3-ubyte{suffix}"
            labels = folder / f"{prefix}-labels-idx1-ubyte{suffix}"
            if images.is_file() and labels.is_file():
                pixels, classes = read_idx(images, 3), read_idx(labels, 1)
                if len(pixels) != len(classes):
                    raise DataError(f"{folder}: {len(pixels)} {prefix} images but {len(classes)} labels")
                return ArrayDataset(pixels, classes, mode, FASHION_MNIST)
    searched = ", ".join(str(folder) for folder in folders)
    debian = "" if own else f", which is in {DEBIAN_FASHION_MNIST}, and read where data.root is left at {DEFAULT_ROOT}"
    raise DataError(
        f"Fashion-MNIST not found, searched {searched}; get it with data.download=true, or as the Debian package "
        f"dataset-fashion-mnist{debian}"
    )


def load_cifar(name: str, train: bool, mode: str, root: Path, download: bool) -> ConvertedDataset:
    """Reads CIFAR-10 or CIFAR-100 (60,000 images of 32x32); raises DataError if it is missing or damaged.

    Args:
        name: "cifar10" or "cifar100".
        train, mode, root, download: as of ``load_fashion_mnist``; 50,000 training and 10,000 test images.
    """
    cls = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[name]
    try:
        return ConvertedDataset(cls(str(root), train=train, download=download), mode)
    except OSError as error:
        raise DataError(f"{name} can't be downloaded to {root}: {error}") from None
    except RuntimeError:
        raise DataError(
            f"{name} not found or not intact, searched {root / cls.base_folder}; get it with data.download=true, or unpack "
            f"{cls.filename} ({cls.url}) in {root}"
        ) from None


def load_factory(source: SplitSource, training: bool) -> Any:
    """Opens what timm.data.create_dataset reads beside image folders; streams shuffle when ``training``."""
    if source.name.partition("/")[0].lower() == "torch":
        return ConvertedDataset(open_vision(source), source.mode, source.images)
    options = {**source.options, "is_training": training, "input_img_mode": source.mode}
    try:
        opened = create_dataset(source.name, root=str(source.root), split=source.split, **options)
    except Exception as error:
        raise source.cant_open(error) from error
    return opened if is_iterable(opened) else ConvertedDataset(opened, source.mode, source.images)


def load_dataset(source: SplitSource, training: bool) -> Any:
    """Opens a data set that is no image folder; see ``splits.open_split`` for any.

    Args:
        source: the split, "train", "validation" or a name in the set; its options are ``download`` and timm's factory's.
        training: iterable sets shuffle when training.

    Returns:
        A map-style data set of (PIL image, int), or an iterable one.

    Raises:
        DataError: missing or malformed; says which folder was searched and how to get it.
    """
    name, split, mode, root = source.name, source.split, source.mode, source.root
    dataset_info(name)
    if name not in INFO:
        return load_factory(source, training)
    train = split in TRAIN_SPLITS
    if not train and split not in EVAL_SPLITS:  # a misspelt training split must not become the test set
        splits = (*TRAIN_SPLITS, *EVAL_SPLITS)
        raise DataError(f"{name} has no split '{split}', known: {', '.join(splits)}{nearest(split, splits)}")
    if name == "digits":
        return load_digits(train, mode)
    place = train, mode, root, bool(source.options.get("download", False))
    return load_fashion_mnist(*place) if name == "fashion_mnist" else load_cifar(name, *place)


def is_iterable(dataset: Any) -> bool:
    """Returns whether the data set only streams, so that its own reader splits it among processes."""
    return isinstance(dataset, IterableDataset)


def subset(dataset: Any, num_samples: int | None) -> Any:
    """Returns the first ``num_samples`` of a fixed shuffle, of a stream in the order of its files; all for None.

    Raises:
        DataError: more samples than there are, or a stream of TFDS.
    """
    if num_samples is None:
        return dataset
    if hasattr(dataset, "first"):
        return dataset.first(num_samples)
    if is_iterable(dataset):
        raise DataError("data.num_samples: TFDS cuts its splits by itself: data.train_split='train[:1000]'")
    if num_samples > len(dataset):
        raise DataError(f"data.num_samples={num_samples}: the training split has {len(dataset)} images")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    return Subset(dataset, order[:num_samples].tolist())
