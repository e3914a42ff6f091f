"""Image folders as data sets: files with the numbers of their classes, by the class map of the run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vit_tucker.config.schema import DataConfig
from vit_tucker.data.class_trees import Scan
from vit_tucker.data.classes import missing_note, names_of, numbers_of, read_class_map, refuse_label, refuse_unknown
from vit_tucker.data.image_files import ImageOptions, to_mode
from vit_tucker.data.layouts import data_root, has_own_list, label_list, scan_split, split_folder
from vit_tucker.data.naming import in_order, listed
from vit_tucker.errors import DataError, nearest

NAMES = ("", "folder", "imagenet")
"""Values of ``data.dataset`` that are image folders."""
MOST_CLASSES = 1_000_000


class FolderDataset(Dataset):
    """Image files with labels; a bad one raises what its decoder does.

    Args:
        folder: of the split.
        images: paths relative to it.
        labels: (n,) int64, the number of each image's class.
        class_names: in the order of their numbers.
        mode: PIL mode of the returned images, "L" or "RGB".
        options: see ``ImageOptions``.
        notes: lines for the log.
    """

    def __init__(
        self,
        folder: Path,
        images: Sequence[str],
        labels: np.ndarray,
        class_names: tuple[str, ...],
        mode: str,
        options: ImageOptions,
        notes: tuple[str, ...],
    ) -> None:
        self.folder, self.images, self.labels = folder, images, labels
        self.class_names, self.mode, self.options, self.notes = class_names, mode, options, notes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.image_name(index)) as opened:
            return to_mode(opened, self.mode, self.options), int(self.labels[index])

    def image_name(self, index: int) -> str:
        """Returns the path of an image."""
        return str(self.folder / self.images[index])


def is_folder_set(name: str) -> bool:
    """Returns whether a value of ``data.dataset`` means image folders."""
    return name in NAMES


def open_folder(data: DataConfig, split: str, mode: str, classes: Sequence[str] | None = None) -> FolderDataset:
    """Opens a split of an image folder set.

    Args:
        data: section of a config.
        split: name of the split.
        mode: PIL mode of the images, "L" or "RGB".
        classes: names of the classes in the order of their numbers; the training split's if None. ``data.class_map`` comes before
            them.

    Raises:
        DataError: the split is missing, its layout does not define classes, or it has classes that the class map lacks.
    """
    if unknown := [key for key, value in data.dataset_kwargs.items() if key != "class_map" and value is not None]:
        raise DataError(
            f"data.dataset_kwargs.{unknown[0]}: image folders have no such option, only class_map"
            f"{nearest(unknown[0], ['class_map'])}"
        )
    scan = scan_split(data, split)
    notes = list(scan.notes)
    given = data.class_map or data.dataset_kwargs.get("class_map")
    if given:
        numbers: Mapping[str, int] = read_class_map(given, [data_root(data), scan.folder])
        scan = mapped(scan, numbers, split, notes)
    else:
        numbers, source = chosen_map(data, split, scan, classes, notes)
        if not scan.numeric:
            refuse_unknown(in_order(scan.names), numbers, split, source)
    names = names_of(numbers)
    labels = numbers_for(scan, numbers, len(names), split)
    present = [names[number] for number in np.unique(labels)]
    notes += missing_note(present, names, split)
    return FolderDataset(scan.folder, scan.images, labels, names, mode, ImageOptions.of(data), tuple(notes))


def folder_classes(data: DataConfig) -> tuple[str, ...]:
    """Returns the names in ``data.class_map``, else of the training split's classes; raises DataError without either."""
    given = data.class_map or data.dataset_kwargs.get("class_map")
    if given:
        folder = split_folder(data, data.train_split)[0]
        return names_of(read_class_map(given, [data_root(data), *([folder] if folder else [])]))
    return own_names(scan_split(data, data.train_split), data.train_split)


def own_names(scan: Scan, split: str) -> tuple[str, ...]:
    """Returns the names of a split's classes, in order; of numbers, those from 0 to the largest (DataError for negative ones)."""
    if not scan.numeric:
        return in_order(scan.names)
    values = [int(name) for name in scan.names]
    worst = min(range(len(values)), key=values.__getitem__)
    if values[worst] < 0:
        refuse_label(values[worst], None, split, str(scan.folder / scan.images[worst]))
    largest = max(range(len(values)), key=values.__getitem__)
    if values[largest] >= MOST_CLASSES:
        refuse_label(values[largest], MOST_CLASSES, split, str(scan.folder / scan.images[largest]))
    return tuple(str(number) for number in range(max(values) + 1))


def chosen_map(
    data: DataConfig, split: str, scan: Scan, classes: Sequence[str] | None, notes: list[str]
) -> tuple[Mapping[str, int], str]:
    """Returns the class map of a split without ``data.class_map``, and where it comes from; adds to the notes.

    Args:
        data: config section.
        split: name of the split.
        scan: its images.
        classes: names that the caller gives, in the order of their numbers; None for those of the training split.
        notes: lines for the log, appended to.
    """
    if classes:
        return numbers_of(classes), "the class map"
    if is_training_split(data, split, scan):
        return numbers_of(own_names(scan, split)), f"split '{split}'"
    if has_training_split(data):
        names = own_names(scan_split(data, data.train_split), data.train_split)
        return numbers_of(names), f"the training split '{data.train_split}'"
    names = own_names(scan, split)
    notes.append(
        f"split '{split}': no training split '{data.train_split}' in {data_root(data)}: the classes are numbered in their own "
        f"order ({listed(names)})"
    )
    return numbers_of(names), f"split '{split}'"


def is_training_split(data: DataConfig, split: str, scan: Scan) -> bool:
    """Returns whether a split is the one that is trained on, perhaps by another name.

    Args:
        data: config section.
        split: name of the split.
        scan: its images.
    """
    folder = split_folder(data, data.train_split)[0]
    same = folder is not None and folder.resolve() == scan.folder.resolve()
    return split == data.train_split or (same and label_list(data, split) == label_list(data, data.train_split))


def has_training_split(data: DataConfig) -> bool:
    """Returns whether there is a training split to number classes by."""
    return split_folder(data, data.train_split)[0] is not None or has_own_list(data, data.train_split)


def mapped(scan: Scan, numbers: Mapping[str, int], split: str, notes: list[str]) -> Scan:
    """Returns the images with a class of ``data.class_map`` and adds a note about the others; raises DataError if none has.

    Args:
        scan: images of the split.
        numbers: ``data.class_map``.
        split: name of the split.
        notes: lines for the log, appended to.
    """
    keep = [name in numbers or scan.numeric for name in scan.names]
    left_out = in_order(name for name, kept in zip(scan.names, keep, strict=True) if not kept)
    if not left_out:
        return scan
    if not any(keep):
        raise DataError(
            f"data.class_map has none of the {len(left_out):,} classes of split '{split}': it has {listed(list(numbers))}, "
            f"the split {listed(left_out)}"
        )
    count = len(keep) - sum(keep)
    notes.append(
        f"split '{split}': data.class_map leaves out {count:,} of {len(keep):,} images, of {len(left_out):,} classes: "
        f"{listed(left_out)}"
    )
    images, names = (
        tuple(value for value, kept in zip(values, keep, strict=True) if kept) for values in (scan.images, scan.names)
    )
    return Scan(scan.folder, images, names, scan.notes, scan.numeric)


def numbers_for(scan: Scan, numbers: Mapping[str, int], count: int, split: str) -> np.ndarray:
    """Returns the number of each image's class, (n,) int64; raises DataError for a number in a CSV file that is none.

    Args:
        scan: images of the split.
        numbers: number of each class name.
        count: number of classes.
        split: name of the split.
    """
    labels = np.empty(len(scan.names), dtype=np.int64)
    for index, name in enumerate(scan.names):
        label = numbers.get(name)
        if label is None:
            label = int(name)
            if not 0 <= label < count:
                refuse_label(label, count, split, str(scan.folder / scan.images[index]))
        labels[index] = label
    return labels
