"""Classes by folders: what a tree of class folders is, and which trees can be read in two ways."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vit_tucker.data.find_images import Found
from vit_tucker.data.label_files import KAGGLE_FILE, TINY_FILE
from vit_tucker.data.naming import in_order, listed
from vit_tucker.errors import DataError

BARE_FOLDERS = frozenset({"images", "image", "imgs", "img"})
"""Folders that hold images of any class."""


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


def unlabelled_message(split: str, folder: Path, images: Sequence[str]) -> str:
    """Returns the message for images without classes.

    Args:
        split: name of the split.
        folder: of the split.
        images: paths below the folder.
    """
    return (
        f"split '{split}': all {len(images):,} images lie directly in {folder}, e.g. {images[0]}, so that their classes "
        f"are unknown; expected {folder}/<class>/<image>, or a list of labels: a CSV file named by data.labels, Tiny-ImageNet's "
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
    places = [name.rpartition("/")[0] for name in images]
    parts = {place: place.split("/") for place in dict.fromkeys(places)}
    by_level = {
        "first": tuple(parts[place][0] for place in places),
        "leaf": tuple(parts[place][-1] for place in places),
    }
    if level is None and len({tuple(part[1:]) for part in parts.values()}) > 1:
        raise DataError(ambiguous_message(split, folder, images, by_level["first"], by_level["leaf"]))
    names = by_level[level or "first"]
    present = set(names)
    if len(present) == 1 and names[0].lower() in BARE_FOLDERS:
        raise DataError(unlabelled_message(split, folder / names[0], [name.rpartition("/")[2] for name in images]))
    if level == "leaf":
        lines += merged_note(split, parts)
    elif empty := [name for name in found.folders if name not in present]:
        lines.append(f"split '{split}': folders without images are no classes: {listed(empty)}")
    return Scan(folder, images, names, tuple(lines))


def ambiguous_message(
    split: str, folder: Path, images: Sequence[str], first: Sequence[str], leaf: Sequence[str]
) -> str:
    """Returns the message for folders in folders that can be read in two ways.

    Args:
        split: name of the split.
        folder: of the split.
        images: paths below the folder.
        first, leaf: class of each image by its first and by its last folder.
    """
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


def merged_note(split: str, places: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns a line about classes that have images in several folders of the same name (path to its parts); none without."""
    folders: dict[str, list[str]] = {}
    for place, parts in places.items():
        folders.setdefault(parts[-1], []).append(place)
    merged = {name: sorted(found) for name, found in folders.items() if len(found) > 1}
    if not merged:
        return []
    name = in_order(merged)[0]
    return [
        f"split '{split}': {len(merged):,} classes have images of several folders, e.g. '{name}' those of {listed(merged[name])}"
    ]
