"""Classes by a list: which image of a folder each row of a list means."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from vit_tucker.data.class_trees import Scan
from vit_tucker.data.find_images import Found
from vit_tucker.data.naming import listed
from vit_tucker.errors import DataError

NUMBER = re.compile(r"-?(0|[1-9][0-9]*)")


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
    """Assigns images the classes that a file lists.

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
    """Returns images by all names that a list may use for them.

    These are paths from the split's, the file's or the root folder, and names, both also without ending. A name that two images
    would
    share is left out.

    Args:
        folder: of the split.
        images: paths below it.
        file: the list.
        root: of the data set.
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
