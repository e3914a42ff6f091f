"""Finds the splits of an image folder set, and the source of the class of each image."""

from collections.abc import Sequence
from pathlib import Path

from vit_tucker.config.schema import DataConfig
from vit_tucker.data import label_files
from vit_tucker.data.class_trees import Scan, by_folders, unlabelled_message
from vit_tucker.data.classes import find_class_file
from vit_tucker.data.find_images import Found, walk
from vit_tucker.data.image_files import image_endings
from vit_tucker.data.listed_images import labelled
from vit_tucker.data.naming import TRAIN_SPLITS, VALIDATION_SPLITS
from vit_tucker.errors import DataError, nearest

SYNONYMS = (TRAIN_SPLITS, VALIDATION_SPLITS)
"""Names of one split, as in timm; the first that is there is read, unless the very name is."""


def data_root(data: DataConfig) -> Path:
    """Returns the folder that has the splits of an image folder set."""
    root = Path(data.root).expanduser()
    return root / "imagenet" if data.dataset == "imagenet" and (root / "imagenet").is_dir() else root


def split_folder(data: DataConfig, split: str) -> tuple[Path | None, list[str]]:
    """Returns the folder of a split, by its name or one of the same meaning, or None; and lines for the log."""
    root = data_root(data)
    group = next((names for names in SYNONYMS if split in names), (split,))
    there = [name for name in dict.fromkeys((split, *group)) if (root / name).is_dir()]
    if not there:
        return None, []
    if len(there) == 1 or len({(root / name).resolve() for name in there}) == 1:
        return root / there[0], []
    key = "train_split" if group == SYNONYMS[0] else "val_split"
    others = " and ".join(f"'{name}'" for name in there[1:])
    note = f"split '{split}': {root} has '{there[0]}' and {others}: '{there[0]}' is read; data.{key}={there[1]} reads the other"
    return root / there[0], [note]


def label_list(data: DataConfig, split: str) -> str | None:
    """Returns the CSV file that ``data.labels`` names for a split, None without; raises DataError for splits that can't be."""
    if not isinstance(data.labels, dict):
        return data.labels
    known = {data.train_split, data.val_split, split, "test", *(name for names in SYNONYMS for name in names)}
    if unknown := [name for name in data.labels if name not in known]:
        raise DataError(
            f"data.labels: there is no split '{unknown[0]}', only '{data.train_split}' and '{data.val_split}'"
            f"{nearest(unknown[0], known)}"
        )
    names = (split, *next((group for group in SYNONYMS if split in group), ()))
    return next((data.labels[name] for name in names if name in data.labels), None)


def has_own_list(data: DataConfig, split: str) -> bool:
    """Returns whether ``data.labels`` names a list for this split alone, so that it needs no folder of its own."""
    return isinstance(data.labels, dict) and label_list(data, split) is not None and data_root(data).is_dir()


def scan_split(data: DataConfig, split: str) -> Scan:
    """Finds the images of a split and their classes; raises DataError for none, or a layout that does not define classes."""
    folder, notes = split_folder(data, split)
    given = label_list(data, split)
    if folder is None and has_own_list(data, split):
        folder = data_root(data)  # all images in one folder, a list for each split
    if folder is None:
        root = data_root(data)
        raise DataError(
            f"no image folder for split '{split}', searched {root} (expected {root}/{split}/<class>/<image>); set data.root, "
            "or put the images there (see data/README.md)"
        )
    if given is not None:
        file = find_class_file(given, [folder, data_root(data)], "data.labels")
        found = found_images(folder, split, [file])
        return labelled(
            folder, split, found, notes, label_files.csv_labels(file, data.label_columns), file, data_root(data), True
        )
    tiny = folder / label_files.TINY_FILE
    if tiny.is_file():
        found = found_images(folder, split, [tiny])
        return labelled(folder, split, found, notes, label_files.tiny_labels(tiny), tiny, data_root(data))
    found = found_images(folder, split)
    if not any("/" in name for name in found.images):
        listing = label_files.find_label_file(folder, data_root(data))
        if listing is None:
            raise DataError(unlabelled_message(split, folder, found.images))
        labels = (
            label_files.kaggle_labels(listing)
            if listing.name == label_files.KAGGLE_FILE
            else label_files.truth_labels(listing, found.images)
        )
        return labelled(folder, split, found, notes, labels, listing, data_root(data))
    return by_folders(folder, split, found, notes, data.class_level)


def found_images(folder: Path, split: str, ignored: Sequence[Path] = ()) -> Found:
    """Returns the images below the folder of a split; raises DataError if there are none.

    Args:
        folder: of the split.
        split: its name.
        ignored: folders below it that are left out.
    """
    found = walk(folder, image_endings(), ignored)
    if not found.images:
        left_out = "; ".join(found.notes(split))
        raise DataError(
            f"split '{split}': no images in {folder} (expected {folder}/<class>/<image>){f'; {left_out}' if left_out else ''}"
        )
    return found
