"""Opening the splits of a run: one way for training, evaluation, calibration, comparison and explanation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.utils.data import Subset

from vit_tucker.config.schema import DataConfig
from vit_tucker.data.datasets import load_dataset, subset
from vit_tucker.data.labels import label_names


class Splits(NamedTuple):
    """The opened splits of a run.

    Attributes:
        train: data set of the training split, cut to ``data.num_samples``; None when only evaluating.
        eval: data set of the evaluation split.
        classes: names of the classes in the order of their numbers, alike for both splits; None if unknown.
        notes: lines for the log.
    """

    train: Any
    eval: Any
    classes: tuple[str, ...] | None
    notes: tuple[str, ...]


def open_splits(
    data: DataConfig,
    channels: int,
    *,
    with_train: bool = True,
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> Splits:
    """Opens both splits of a run with one class map.

    Args:
        data: section of a config.
        channels: of the model's images.
        with_train: open the training split too.
        classes: stored class map of the run or the model: names in the order of their numbers; the training split's if None.
        num_classes: of the model; None if it may be any.
        batch_size, seed: see ``open_split``.

    Raises:
        DataError: a split is missing or malformed, or the classes of the splits don't fit.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    train = None
    if with_train:
        train = open_split(data, data.train_split, True, channels, classes=classes, **options)
        classes = classes or class_names(data, train)
        train = subset(train, data.num_samples)
    evaluation = open_split(data, data.val_split, False, channels, classes=classes, **options)
    names = tuple(classes) if classes else class_names(data, evaluation)
    return Splits(train, evaluation, names, (*split_notes(train), *split_notes(evaluation)))


def open_split(
    data: DataConfig,
    split: str,
    training: bool,
    channels: int,
    *,
    classes: Sequence[str] | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> Any:
    """Opens one split of a data set.

    Args:
        data: section of a config.
        split: name of the split.
        training: streamed sets shuffle when training.
        channels: of the model's images: 1 for grey ones, else RGB.
        classes: names of the classes in the order of their numbers; the training split's if None.
        batch_size: images of one process per step, for readers of streams.
        seed: of the run, for readers of streams.

    Returns:
        A map-style data set of (PIL image, int), or an iterable one (timm's readers).

    Raises:
        DataError: the split is missing or malformed, or has classes that ``classes`` lacks.
    """
    options = {"download": data.download, "batch_size": batch_size, "seed": seed, **data.dataset_kwargs}
    return load_dataset(data.dataset, split, training, "L" if channels == 1 else "RGB", data.root, options)


def class_names(data: DataConfig, dataset: Any) -> tuple[str, ...] | None:
    """Returns the names of the classes of an opened split, in the order of their numbers; None if it doesn't tell.

    Args:
        data: section of a config.
        dataset: as ``open_split`` returns it, or a subset of it.
    """
    return label_names(data.dataset, dataset)


def split_notes(dataset: Any) -> tuple[str, ...]:
    """Returns what the log has to say about an opened split: files left out, classes without images, the folder read.

    Args:
        dataset: as ``open_split`` returns it, or a subset of it; None for none.
    """
    if isinstance(dataset, Subset):
        return split_notes(dataset.dataset)
    return tuple(getattr(dataset, "notes", ()))
