"""What class each image of a folder has: by the folders that it is in, or by a file that lists the labels."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vit_tucker.config.schema import DataConfig
from vit_tucker.data.classes import find_file
from vit_tucker.data.image_files import image_endings
from vit_tucker.data.label_files import (
    KAGGLE_FILE,
    TINY_FILE,
    csv_labels,
    find_label_file,
    kaggle_labels,
    tiny_labels,
    truth_labels,
)
from vit_tucker.data.naming import in_order, listed
from vit_tucker.data.walk import Found, walk
from vit_tucker.errors import DataError, nearest

SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))
"""Names of one split, as in timm; the first that is there is read, unless the very name is."""
BARE_FOLDERS = frozenset({"images", "image", "imgs", "img"})
"""Folders that hold images of any class."""
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class Scan:
    """The images of a split, and what class each has.

    Attributes:
        folder: of the split.
        images: paths relative to it, with slashes.
        names: the class of each; as text, if it is a number in a CSV file.
        notes: lines for the log.
        numeric: the classes are numbers, of a CSV file.
    """

    folder: Path
    images: tuple[str, ...]
    names: tuple[str, ...]
    notes: tuple[str, ...]
    numeric: bool = False


def data_root(data: DataConfig) -> Path:
    """Returns the folder that has the splits of an image folder set."""
    root = Path(data.root).expanduser()
    return root / "imagenet" if data.dataset == "imagenet" and (root / "imagenet").is_dir() else root


def split_folder(data: DataConfig, split: str) -> tuple[Path | None, list[str]]:
    """Finds the folder of a split.

    Args:
        data: section of a config.
        split: name of the folder, or of another of the same meaning.

    Returns:
        The folder; None if there is none. Lines for the log.
    """
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
    """Returns what ``data.labels`` names for a split: a CSV file; None for none.

    Raises:
        DataError: it names a split that there can't be.
    """
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
    """Whether ``data.labels`` names a list for this split alone, so that it needs no folder of its own."""
    return isinstance(data.labels, dict) and label_list(data, split) is not None and data_root(data).is_dir()


def scan_split(data: DataConfig, split: str) -> Scan:
    """Finds the images of a split and their classes.

    Args:
        data: section of a config.
        split: name of the split.

    Raises:
        DataError: no images, or a layout that does not tell their classes.
    """
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
        file = find_file(given, [folder, data_root(data)], "data.labels")
        found = found_images(folder, split, [file])
        return labelled(folder, split, found, notes, csv_labels(file, data.label_columns), file, data_root(data), True)
    tiny = folder / TINY_FILE
    if tiny.is_file():
        found = found_images(folder, split, [tiny])
        return labelled(folder, split, found, notes, tiny_labels(tiny), tiny, data_root(data))
    found = found_images(folder, split)
    if not any("/" in name for name in found.images):
        listing = find_label_file(folder, data_root(data))
        if listing is None:
            raise DataError(bare(split, folder, found.images))
        labels = kaggle_labels(listing) if listing.name == KAGGLE_FILE else truth_labels(listing, found.images)
        return labelled(folder, split, found, notes, labels, listing, data_root(data))
    return by_folders(folder, split, found, notes, data.class_level)


def found_images(folder: Path, split: str, ignored: Sequence[Path] = ()) -> Found:
    """Returns the images below the folder of a split.

    Raises:
        DataError: there are none.
    """
    found = walk(folder, image_endings(), ignored)
    if not found.images:
        left_out = "; ".join(found.notes(split))
        raise DataError(
            f"split '{split}': no images in {folder} (expected {folder}/<class>/<image>){f'; {left_out}' if left_out else ''}"
        )
    return found


def bare(split: str, folder: Path, images: Sequence[str]) -> str:
    """Returns the message for images whose classes nothing tells."""
    return (
        f"split '{split}': all {len(images):,} images lie directly in {folder}, e.g. {images[0]}, so that nothing tells their "
        f"classes; expected {folder}/<class>/<image>, or a list of labels: a CSV file named by data.labels, Tiny-ImageNet's "
        f"{TINY_FILE}, ImageNet's {KAGGLE_FILE} or ground truth"
    )


def by_folders(folder: Path, split: str, found: Found, notes: Sequence[str], level: str | None) -> Scan:
    """Reads classes off the folders: of the first level where they all have their images in the same place.

    Args:
        folder: of the split.
        split: its name.
        found: its images.
        notes: lines for the log so far.
        level: "first" or "leaf" for the folder that names the class, where that is not clear.

    Raises:
        DataError: it is not clear; or most images are in no folder.
    """
    images = tuple(name for name in found.images if "/" in name)
    stray = [name for name in found.images if "/" not in name]
    lines = [*notes, *found.notes(split)]
    if len(stray) > len(images):
        raise DataError(
            f"split '{split}': {len(stray):,} images lie directly in {folder} and {len(images):,} in folders "
            f"({listed(found.folders)}); expected {folder}/<class>/<image>"
        )
    if stray:
        lines.append(f"split '{split}': left out: {len(stray):,} images beside the class folders: {listed(stray)}")
    parts = [name.split("/") for name in images]
    first, leaf = [part[0] for part in parts], [part[-2] for part in parts]
    if level is None and len({tuple(part[1:-1]) for part in parts}) > 1:
        raise DataError(ambiguous(split, folder, images, first, leaf))
    names = tuple(leaf if level == "leaf" else first)
    if len(set(names)) == 1 and names[0].lower() in BARE_FOLDERS:
        raise DataError(bare(split, folder / names[0], [part[-1] for part in parts]))
    if level == "leaf":
        lines += merged_note(split, parts)
    elif empty := [name for name in found.folders if name not in set(first)]:
        lines.append(f"split '{split}': folders without images are no classes: {listed(empty)}")
    return Scan(folder, images, names, tuple(lines))


def ambiguous(split: str, folder: Path, images: Sequence[str], first: Sequence[str], leaf: Sequence[str]) -> str:
    """Returns the message for folders in folders that can be read in two ways."""
    depths = Counter(name.count("/") for name in images)
    shortest, longest = min(images, key=lambda name: name.count("/")), max(images, key=lambda name: name.count("/"))
    if len(depths) > 1:
        seen = f"images lie at several depths ({shortest}, {longest})"
    else:
        other = next(name for name in images if name.split("/")[1:-1] != images[0].split("/")[1:-1])
        seen = f"images lie in folders inside folders that differ ({images[0]}, {other})"
    by_first, by_leaf = in_order(first), in_order(leaf)
    return (
        f"split '{split}' of {folder}: {seen}; expected <class>/<image>: by the first folder there are {len(by_first):,} classes "
        f"({listed(by_first)}), by the last one {len(by_leaf):,} ({listed(by_leaf)}); choose by data.class_level: first or leaf"
    )


def merged_note(split: str, parts: Sequence[Sequence[str]]) -> list[str]:
    """Returns a line about classes that have images in several folders of the same name; none if there are none."""
    places: dict[str, set[str]] = {}
    for part in parts:
        places.setdefault(part[-2], set()).add("/".join(part[:-1]))
    merged = {name: sorted(folders) for name, folders in places.items() if len(folders) > 1}
    if not merged:
        return []
    name = in_order(merged)[0]
    return [
        f"split '{split}': {len(merged):,} classes have images of several folders, e.g. '{name}' those of {listed(merged[name])}"
    ]


def labelled(
    folder: Path,
    split: str,
    found: Found,
    notes: Sequence[str],
    labels: Mapping[str, str],
    file: Path,
    root: Path,
    own: bool = False,
) -> Scan:
    """Gives images the classes that a file lists.

    Args:
        folder, split, found, notes: see ``by_folders``.
        labels: class of each image, by its path or name, with or without ending.
        file: where they were read.
        root: of the data set.
        own: the file is the user's: its classes may be numbers, and it may list other splits too.

    Raises:
        DataError: no image is listed, or one with two classes.
    """
    index = image_index(folder, found.images, file, root)
    chosen: dict[str, str] = {}
    missing = []
    for key, label in labels.items():
        image = index.get(key)
        if image is None:
            if not (own and ((file.parent / key).is_file() or (root / key).is_file())):
                missing.append(key)
        elif chosen.setdefault(image, label) != label:
            raise DataError(f"{file}: lists {image} twice, as '{chosen[image]}' and '{label}'")
    images = tuple(image for image in found.images if image in chosen)
    if not images:
        raise DataError(
            f"{file}: lists none of the {len(found.images):,} images of split '{split}' in {folder}: it has "
            f"{listed(list(labels))}, the folder {listed(found.images)}"
        )
    lines = [*notes, *found.notes(split), f"split '{split}': classes by {file}"]
    if left_out := [image for image in found.images if image not in chosen]:
        lines.append(
            f"split '{split}': left out: {len(left_out):,} images without a row in {file.name}: {listed(left_out)}"
        )
    if missing:
        lines.append(f"split '{split}': {len(missing):,} rows of {file.name} without an image: {listed(missing)}")
    names = tuple(chosen[image] for image in images)
    return Scan(folder, images, names, tuple(lines), own and all(NUMBER.fullmatch(name) for name in names))


def image_index(folder: Path, images: Sequence[str], file: Path, root: Path) -> dict[str, str]:
    """Returns images by all that a list may call them: paths from the split's, the file's or the root folder, names, both also
    without ending; what two images would share is left out.
    """
    index: dict[str, str] = {}
    bases = []
    for base in (file.parent.resolve(), root.resolve()):
        if folder.resolve() != base and folder.resolve().is_relative_to(base):
            bases.append(folder.resolve().relative_to(base).as_posix() + "/")
    for name in images:
        for key in (name, *(base + name for base in bases)):
            index.setdefault(key, name)
    loose: dict[str, set[str]] = {}
    for name in images:
        for key in {name.rpartition("/")[2], name.rpartition(".")[0], name.rpartition("/")[2].rpartition(".")[0]}:
            loose.setdefault(key, set()).add(name)
    return {**{key: names.pop() for key, names in loose.items() if len(names) == 1}, **index}
