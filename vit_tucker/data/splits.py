"""Opening the splits of a run: one way for training, evaluation, calibration, comparison and explanation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Subset

from vit_tucker.config.schema import DataConfig
from vit_tucker.data.classes import read_class_map, refuse_changed
from vit_tucker.data.column_sets import open_columns
from vit_tucker.data.column_streams import open_column_stream
from vit_tucker.data.datasets import INFO, is_iterable, load_dataset, subset
from vit_tucker.data.folders import folder_classes, has_training_split, is_folder_set, open_folder, own_names
from vit_tucker.data.image_files import ImageOptions, image_mode
from vit_tucker.data.labels import check_labels, class_names, labels_of
from vit_tucker.data.layouts import scan_split
from vit_tucker.data.naming import listed
from vit_tucker.data.shards import open_shards
from vit_tucker.data.split_source import SplitSource, refuse_remote_code
from vit_tucker.errors import ConfigError, DataError

OPENERS = {"hfds": open_columns, "hfids": open_column_stream, "wds": open_shards}
"""What opens the formats that are read by their columns or keys, by the prefix of ``data.dataset``."""


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
    options: dict[str, Any] = {"num_classes": num_classes, "batch_size": batch_size, "seed": seed}
    train = None
    if with_train:
        train = open_split(data, data.train_split, True, channels, **options)
        own = class_names(train)
        if classes and own:
            refuse_changed(own, classes, data.train_split)
        classes = own or classes
        train = subset(train, data.num_samples)
    evaluation = open_split(data, data.val_split, False, channels, classes=classes, **options)
    names = class_names(evaluation) or (tuple(classes) if classes else None)
    notes = (*split_notes(train), *split_notes(evaluation))
    if data.check and any(dataset is not None and is_iterable(dataset) for dataset in (train, evaluation)):
        notes = (*notes, "data.check: images of a stream are only seen as they are read")
    opened = {data.train_split: train, data.val_split: evaluation} if with_train else {data.val_split: evaluation}
    if num_classes is not None:
        for split, dataset in opened.items():
            check_labels(dataset, num_classes, split)
        refuse_too_many(names, num_classes)
    if (is_folder_set(data.dataset) or has_opener(data.dataset)) and names is not None:
        notes = (*notes, classes_note(names, num_classes, opened))
    return Splits(train, evaluation, names, notes)


def refuse_too_many(names: Sequence[str] | None, num_classes: int) -> None:
    """Raises DataError if a class map has more classes than the model."""
    if names is not None and len(names) > num_classes:
        raise DataError(
            f"model.num_classes={num_classes}: the class map has {len(names):,} classes ({listed(names)}); leave it out, or "
            "choose some by data.class_map"
        )


def classes_note(names: Sequence[str], num_classes: int | None, opened: Mapping[str, Any]) -> str:
    """Returns a line about the number of classes: of the class map, of each split, of the model.

    Args:
        names: of the classes.
        num_classes: outputs of the model, None if unknown.
        opened: data sets by split.
    """
    counts = []
    for split, dataset in opened.items():
        labels = labels_of(dataset)
        if labels is not None:
            counts.append(f"{len(np.unique(labels)):,} in split '{split}'")
    line = f"classes: {len(names):,} ({listed(names)})" + (f"; with images: {', '.join(counts)}" if counts else "")
    if num_classes is None or num_classes == len(names):
        return line
    return f"{line}; the model has {num_classes:,}, {num_classes - len(names):,} of them never seen"


def open_split(
    data: DataConfig,
    split: str,
    training: bool,
    channels: int,
    *,
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
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
        num_classes: of the model; None if it may be any.
        batch_size: images of one process per step, for readers of streams.
        seed: of the run, for readers of streams.

    Returns:
        A map-style data set of (PIL image, int), or an iterable one.

    Raises:
        DataError: the split is missing or malformed, or has classes that ``classes`` lacks.
    """
    mode = image_mode(channels)
    if is_folder_set(data.dataset):
        return open_folder(data, split, mode, classes)
    refuse_folder_keys(data)
    refuse_remote_code(data.dataset_kwargs)
    root = Path(data.root).expanduser()
    given = data.class_map if data.class_map is not None else data.dataset_kwargs.get("class_map")
    numbers = None if given is None else read_class_map(given, [root])
    options = {"download": data.download, "batch_size": batch_size, "seed": seed, **data.dataset_kwargs}
    source = SplitSource(
        name=data.dataset,
        split=split,
        train_split=data.train_split,
        mode=mode,
        root=root,
        images=ImageOptions.of(data),
        options={**options, "class_map": numbers},
        classes=classes,
        num_classes=num_classes,
        class_map=numbers,
    )
    if has_opener(data.dataset):
        return OPENERS[data.dataset.partition("/")[0].lower()](source)
    return load_dataset(source, training)


def has_opener(name: str) -> bool:
    """Returns whether a data set, by its name in a config, is read by its columns or keys."""
    return name.partition("/")[0].lower() in OPENERS and "/" in name


def refuse_folder_keys(data: DataConfig) -> None:
    """Raises ConfigError for keys of image folders with another data set, which would not use them."""
    fixed = data.dataset in INFO or data.dataset.partition("/")[0].lower() == "torch"
    for key in ("labels", "class_level", *(["class_map"] if fixed else [])):
        if getattr(data, key) is not None or (fixed and data.dataset_kwargs.get(key) is not None):
            raise ConfigError(f"data.{key}: is for image folders; the data set '{data.dataset}' has labels of its own")


def inferred_classes(data: DataConfig) -> int | None:
    """Returns the number of classes that a data set's training split has, by its files; None if unknown."""
    if is_folder_set(data.dataset):
        return len(folder_classes(data))
    if not has_opener(data.dataset):
        return None
    split = open_split(data, data.train_split, False, 3)
    if (names := class_names(split)) is not None:
        return len(names)
    labels = labels_of(split)
    return None if labels is None or not len(labels) else int(labels.max()) + 1


def choose_classes(
    data: DataConfig, stored: Sequence[str] | None, label_names: Sequence[str] | None, num_classes: int, own: bool
) -> tuple[tuple[str, ...] | None, list[str]]:
    """Chooses the class map by which a trained model is scored on a data set.

    Args:
        data: section of a config; its ``class_map`` comes before all.
        stored: class map of the run that the model is of; None if it is of none.
        label_names: of the model, as its config.json has them.
        num_classes: of the model.
        own: the data set is the run's.

    Returns:
        Names in the order of their numbers, None for what the data set says itself; and lines for the user.

    Raises:
        DataError: the numbers of the classes are unknown.
    """
    if data.class_map or data.dataset_kwargs.get("class_map"):
        return None, []
    if stored and own:
        return tuple(stored), []
    if is_folder_set(data.dataset):
        names = own_names(scan_split(data, data.val_split), data.val_split)
    elif has_opener(data.dataset):
        names = class_names(open_split(data, data.val_split, False, 3)) or ()
    else:
        return None, []
    for known in (stored, label_names):
        if known and set(names) & set(known):
            return tuple(known), []
    if not is_folder_set(data.dataset) or has_training_split(data):
        return None, []
    if len(names) != num_classes:
        raise DataError(
            f"split '{data.val_split}' has {len(names):,} classes ({listed(names)}) and the model {num_classes:,}, and there "
            f"is no training split '{data.train_split}' that numbers them; set data.class_map"
        )
    return names, [
        f"split '{data.val_split}': neither the model nor a training split numbers its classes: taken in their own order "
        f"({listed(names)})"
    ]


def split_notes(dataset: Any) -> tuple[str, ...]:
    """Returns lines for the log about an opened split, or None: files left out, classes without images, the folder read."""
    if isinstance(dataset, Subset):
        return split_notes(dataset.dataset)
    return tuple(getattr(dataset, "notes", ()))
