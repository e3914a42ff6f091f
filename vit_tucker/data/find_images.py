"""The images below a folder: without hidden files and folders, and without going round in a circle of links."""

import os
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from vit_tucker.data.naming import in_order, listed, natural_key
from vit_tucker.errors import DataError

SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini", "icon\r"})
"""Files that file managers leave beside images, in lower case."""
SYSTEM_FOLDERS = frozenset({"__macosx", "$recycle.bin", "system volume information", "@eadir", "lost+found"})


class Found(NamedTuple):
    """The images and other files below a folder.

    Attributes:
        images: paths relative to the folder, with slashes, in natural order.
        left_out: number of files that are no images, by their ending in lower case ('' for none).
        circles: links to a folder that they are in themselves; not followed.
        folders: names of the folders directly in it.
    """

    images: tuple[str, ...]
    left_out: Mapping[str, int]
    circles: tuple[str, ...]
    folders: tuple[str, ...]

    def notes(self, split: str) -> list[str]:
        """Returns lines for the log about the files of a split that are not read."""
        notes = []
        if count := sum(self.left_out.values()):
            kinds = sorted(self.left_out.items(), key=lambda pair: (-pair[1], pair[0]))
            shown = ", ".join(f"{ending or 'no ending'} {number:,}" for ending, number in kinds)
            what = "file that is no image" if count == 1 else "files that are no images"
            notes.append(f"split '{split}': left out: {count:,} {what} ({shown})")
        if self.circles:
            notes.append(f"split '{split}': not followed: links into folders that they are in: {listed(self.circles)}")
        return notes


def walk(folder: Path, endings: Collection[str], ignored: Collection[Path] = ()) -> Found:
    """Finds all images below a folder. Links are followed, but not into a folder that they are in.

    Args:
        folder: where to look.
        endings: of image files, in lower case with their dots.
        ignored: files that are known not to be images, such as lists of labels.

    Raises:
        DataError: a folder can't be read.
    """
    images: list[str] = []
    left_out: Counter[str] = Counter()
    circles: list[str] = []
    folders: list[str] = []
    known = {file.resolve() for file in ignored}
    real = folder.resolve()
    todo = [(folder, "", frozenset(identity(part) for part in (real, *real.parents)))]
    while todo:
        place, prefix, above = todo.pop()
        for entry in entries(place):
            name = prefix + entry.name
            if hidden(entry.name):
                continue
            if is_folder(entry):
                if not prefix:
                    folders.append(name)
                own = identity(Path(entry.path))
                if own in above:
                    circles.append(name)
                else:
                    todo.append((Path(entry.path), f"{name}/", above | {own}))
            elif (ending := os.path.splitext(entry.name)[1].lower()) in endings:
                images.append(name)
            elif not known or Path(entry.path).resolve() not in known:
                left_out[ending] += 1
    images.sort(key=lambda name: (natural_key(name), name))
    return Found(tuple(images), left_out, tuple(sorted(circles)), in_order(folders))


def hidden(name: str) -> bool:
    """Returns whether a file or folder is no part of a data set: hidden, or the operating system's own."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES or name.lower() in SYSTEM_FOLDERS


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Returns whether an entry is a folder, or a link to one; a link that leads nowhere is a file, which can't be opened."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def identity(folder: Path) -> tuple[int, int]:
    """Returns a value that is equal for two paths of the same folder."""
    facts = folder.stat()
    return facts.st_dev, facts.st_ino


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """Returns the files and folders in a folder; raises DataError if it can't be read."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError as error:
        raise DataError(f"{folder}: the folder can't be read: {error.strerror}") from None
