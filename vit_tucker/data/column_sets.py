"""Hugging Face's `datasets`, map-style (hfds/)."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vit_tucker.data import columns
from vit_tucker.data.class_numbers import Targets, label_numbers
from vit_tucker.data.classes import missing_note
from vit_tucker.data.image_files import to_mode
from vit_tucker.data.naming import in_order, listed
from vit_tucker.data.split_source import Raw, SplitSource
from vit_tucker.errors import DataError

MAP_OPTIONS = ("input_key", "target_key")


class ColumnDataset(Dataset):
    """A map-style set of `datasets`; its labels are known from the beginning.

    Args:
        table: datasets.Dataset with the column of the images, not decoded.
        source: what is read, and how.
        labels: (n,) class numbers.
        class_names: of the classes, in the order of their numbers; None if unknown.
        notes: lines for the log.
    """

    def __init__(
        self,
        table: Any,
        source: SplitSource,
        labels: np.ndarray,
        class_names: tuple[str, ...] | None,
        notes: Sequence[str],
    ) -> None:
        self.table, self.source, self.labels = table, source, labels
        self.key, _ = columns.columns_of(source)
        self.class_names, self.notes = class_names, tuple(notes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_stored(self.table[index][self.key], self.source), int(self.labels[index])

    def image_name(self, index: int) -> str | None:
        """Returns the file name that the set has for an image; None if it has none."""
        return stored_name(self.table[index][self.key])


def open_columns(source: SplitSource) -> ColumnDataset:
    """Opens a split of a map-style set; its columns and all its labels are checked, no image is read.

    Raises:
        DataError: a split, column, label or class that can't be.
    """
    source.check_options(MAP_OPTIONS)
    builder = columns.load_by_datasets("load_dataset_builder", source)
    columns.check_split(builder, source)
    table = columns.load_by_datasets("load_dataset", source, split=source.split)
    columns.check_columns(table.features, source)
    image_key, label_key = columns.columns_of(source)
    raw = label_column(table, source)
    targets = split_targets(builder, source, table.features[label_key], raw)
    images = undecoded(table.select_columns([image_key]), image_key)
    notes: list[str] = []
    if source.class_map is not None:
        keep, notes = mapped(targets, raw, source)
        raw = [raw[index] for index in keep]
        images = images.select(keep) if notes else images
    labels = label_numbers(targets, raw)
    if targets.classes is not None and source.class_map is None:
        present = [targets.classes[number] for number in np.unique(labels)]
        notes = missing_note(present, targets.classes, source.split)
    return ColumnDataset(images, source, labels, targets.class_names, notes)


def mapped(targets: Targets, raw: Sequence[Raw], source: SplitSource) -> tuple[list[int], list[str]]:
    """Returns the images with a class of ``data.class_map`` and a note about the others; raises DataError if none has one.

    Args:
        targets: of the split's labels.
        raw: label of each image, as stored.
        source: what is read, with a class map.
    """
    assert source.class_map is not None
    known = {label: targets.mapped_key(label) is not None for label in set(raw)}
    left_out = in_order(targets.name_of(label) for label, kept in known.items() if not kept)
    keep = [index for index, label in enumerate(raw) if known[label]]
    if raw and not keep:
        raise DataError(
            f"{targets.where}: data.class_map has none of its {len(left_out):,} classes: it has "
            f"{listed(list(source.class_map))}, the split {listed(left_out)}"
        )
    if not left_out:
        return keep, []
    line = f"split '{source.split}': data.class_map leaves out {len(raw) - len(keep):,} of {len(raw):,} images, of "
    return keep, [f"{line}{len(left_out):,} classes: {listed(left_out)}"]


def undecoded(table: Any, key: str) -> Any:
    """Returns a table, or stream, whose column of images is read as files, bytes or paths."""
    from datasets import Image as ImageFeature

    if not isinstance(table.features[key], ImageFeature):
        return table
    return table.cast_column(key, ImageFeature(decode=False))


def label_column(table: Any, source: SplitSource) -> list[Raw]:
    """Returns all labels of a split; raises DataError for images without one."""
    _, key = columns.columns_of(source)
    column = table.select_columns([key]).with_format("arrow")[:].column(key)
    if column.null_count:
        first = column.to_pylist().index(None)
        raise DataError(
            f"{label_source(source)}, split '{source.split}': image {first} has no label, as {column.null_count} of {len(column)}"
            " images; unlabelled images can't be used"
        )
    return [plain(value) for value in column.to_pylist()]


def plain(value: Any) -> Raw:
    """Returns a label as a number or a name."""
    return value if isinstance(value, str) else int(value)


def label_source(source: SplitSource) -> str:
    """Returns where the labels come from, for messages."""
    return f"column '{columns.columns_of(source)[1]}' of {source.name}"


def split_targets(builder: Any, source: SplitSource, feature: Any, raw: Sequence[Raw] | None) -> Targets:
    """Returns what makes class numbers of the labels of a split.

    Args:
        builder: of the data set.
        source: the split.
        feature: type of the column of the labels.
        raw: all labels of the split; None for a stream.
    """
    named = getattr(feature, "dtype", None) in columns.STRING_TYPES
    names = None if named else own_names(builder, source, feature)
    classes = source.classes
    if classes is None and source.class_map is None:
        training = replace(source, split=source.train_split)
        known = columns.split_names(builder)
        other = source.split != source.train_split and source.train_split in known
        if named:
            classes = in_order(map(str, label_values(builder, training if other else source, raw, other)))
        elif names is not None:
            classes = own_names(builder, training, feature) if other else names
    return Targets(label_source(source), source.split, names, classes, source.class_map, source.num_classes)


def own_names(builder: Any, source: SplitSource, feature: Any) -> tuple[str, ...] | None:
    """Returns the class names of a split's ClassLabel, as its own files have them; None for a column of another type.

    Args:
        builder: of `datasets`.
        source: what is read.
        feature: type of the label column.
    """
    stored = columns.stored_names(builder, source, columns.columns_of(source)[1])
    names = getattr(feature, "names", None)
    return stored or (tuple(names) if names is not None else None)


def label_values(builder: Any, source: SplitSource, raw: Sequence[Raw] | None, other: bool) -> Iterable[Raw]:
    """Returns the different labels of a split: of a stream by one pass through its column.

    Args:
        builder: of the data set.
        source: the split.
        raw: all labels of the split that is opened; None for a stream.
        other: ``source`` is another one than that.
    """
    if raw is not None:
        return set(
            label_column(columns.load_by_datasets("load_dataset", source, split=source.split), source) if other else raw
        )
    _, key = columns.columns_of(source)
    stream = builder.as_streaming_dataset(split=source.split).select_columns([key])
    return {label for batch in stream.iter(batch_size=1000) for label in batch[key] if label is not None}


def read_stored(stored: Any, source: SplitSource) -> Image.Image:
    """Returns an image as `datasets` stores it: its bytes, or the path or address of its file."""
    with open_stored(stored) as file, Image.open(file) as image:
        return to_mode(image, source.mode, source.images)


def open_stored(stored: Any) -> BinaryIO:
    """Opens the file of a stored image; raises ValueError if there is none."""
    content, path = (stored.get("bytes"), stored.get("path")) if isinstance(stored, dict) else (None, stored)
    if isinstance(path, bytes):
        content = path
    if content:
        return io.BytesIO(content)
    if not path:
        raise ValueError("the image has neither bytes nor a path")
    if "://" in str(path):
        import fsspec

        with fsspec.open(str(path), "rb") as file:
            return io.BytesIO(file.read())
    return cast(BinaryIO, Path(path).open("rb"))


def stored_name(stored: Any) -> str | None:
    """Returns the path or file name of a stored image; None if it has none."""
    path = stored.get("path") if isinstance(stored, dict) else stored
    return path if isinstance(path, str) and path else None
