"""The class map of a run: which number each class has. Made once from the training split; stored; used for every split."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from vit_tucker.data.naming import listed
from vit_tucker.errors import DataError, nearest, one_line
from vit_tucker.storage.run_files import CLASSES_FILE

ENDINGS = (".txt", ".json")


def numbers_of(names: Sequence[str]) -> dict[str, int]:
    """Returns the class map of names in the order of their numbers."""
    return {name: number for number, name in enumerate(names)}


def names_of(numbers: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the names in the order of their numbers; classes that share a number have their names joined."""
    groups: dict[int, list[str]] = {}
    for name, number in numbers.items():
        groups.setdefault(number, []).append(name)
    return tuple("/".join(groups[number]) for number in sorted(groups))


def read_class_map(given: Mapping[str, int] | str, folders: Sequence[Path]) -> dict[str, int]:
    """Reads the class map that ``data.class_map`` gives, or the file that it names.

    Args:
        given: the map itself, or the path of a .txt file (a name in each line, or 'name number' in all of them) or .json file
            (a list of names, or an object of names and numbers).
        folders: where a relative path may lie.

    Returns:
        The number of each class; numbers begin with 0 and have no gaps.

    Raises:
        DataError: the file is missing or of another format; a name is there twice, or a number is missing.
    """
    if isinstance(given, Mapping):
        return checked_map([(str(name), number) for name, number in given.items()], "data.class_map")
    file = find_class_file(given, folders, "data.class_map")
    where = f"data.class_map: {file}"
    if file.suffix.lower() not in ENDINGS:
        hint = "; nothing is unpickled" if file.suffix.lower() in (".pkl", ".pickle") else ""
        raise DataError(f"{where}: a class map is a {' or '.join(ENDINGS)} file, or a dict in the config{hint}")
    try:
        text = file.read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=list) if file.suffix.lower() == ".json" else None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: can't be read: {one_line(error, 120)}") from None
    if content is None:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return checked_map(text_map(lines), where)
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return checked_map([(name, number) for number, name in enumerate(content)], where)
    if text.lstrip().startswith("{"):
        return checked_map([tuple(pair) for pair in content], where)
    raise DataError(f"{where}: expected a list of names, or an object of names and numbers")


def text_map(lines: Sequence[str]) -> list[tuple[str, int]]:
    """Returns the pairs of a text file: 'name number' if every line ends with a number after a name, else a name in each line."""
    pairs = [line.rsplit(maxsplit=1) for line in lines]
    if pairs and all(len(pair) == 2 and pair[1].isascii() and pair[1].isdigit() for pair in pairs):
        return [(name, int(number)) for name, number in pairs]
    return [(name, number) for number, name in enumerate(lines)]


def checked_map(pairs: Sequence[tuple[str, object]], where: str) -> dict[str, int]:
    """Returns pairs of names and numbers as a class map; raises DataError as ``read_class_map`` does."""
    numbers: dict[str, int] = {}
    for name, number in pairs:
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise DataError(f"{where}: '{name}' has {number!r} in the place of a number from 0 on")
        if name in numbers:
            raise DataError(
                f"{where}: the class '{name}' is there twice, with the numbers {numbers[name]} and {number}"
            )
        numbers[name] = number
    if not numbers:
        raise DataError(f"{where}: has no classes")
    if missing := sorted(set(range(max(numbers.values()) + 1)) - set(numbers.values())):
        raise DataError(
            f"{where}: numbers must go from 0 to {max(numbers.values())} without gaps; no class has {listed(missing)}"
        )
    return numbers


def find_class_file(given: str, folders: Sequence[Path], key: str) -> Path:
    """Finds a file of the config, absolute or relative to the current or one of the folders; raises DataError without one.

    Args:
        given: path as the config has it.
        folders: where a relative path is looked for, after the current folder.
        key: of the config, for the message.
    """
    path = Path(given).expanduser()
    for place in (Path(), *folders):
        if (place / path).is_file():
            return place / path
    searched = "" if path.is_absolute() else f"; searched {listed(list(dict.fromkeys([Path().resolve(), *folders])))}"
    raise DataError(f"{key}: {given}: no such file{searched}")


def stored_classes(folder: Path | None) -> tuple[str, ...] | None:
    """Returns the class names of a run folder in the order of their numbers; None if there are none stored."""
    file = None if folder is None else folder / CLASSES_FILE
    if file is None or not file.is_file():
        return None
    return names_of(read_class_map(str(file.resolve()), []))


def padded(names: Sequence[str], count: int) -> tuple[str, ...]:
    """Returns one name for each class of a model: the numbers of those without one."""
    taken = set(names)
    rest = (str(number) if str(number) not in taken else f"class {number}" for number in range(len(names), count))
    return (*names, *rest)


def unpadded(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names without those that ``padded`` may have added; all, if the names are all numbers."""
    count = len(names)
    while count and names[count - 1] in (str(count - 1), f"class {count - 1}"):
        count -= 1
    return tuple(names[:count] or names)


def refuse_unknown(names: Sequence[str], known: Mapping[str, int], split: str, source: str) -> None:
    """Raises DataError if a split has classes that the class map lacks.

    Args:
        names: classes of the split.
        known: the class map.
        split: name of the split.
        source: where the map comes from, for the message.
    """
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    one = len(unknown) == 1
    raise DataError(
        f"split '{split}' has {'a class' if one else f'{len(unknown):,} classes'} that {source} lacks: {listed(unknown)}; it has "
        f"{len(known):,}: {listed(list(known))}; rename the folder, or leave classes out by data.class_map"
        f"{nearest(unknown[0], known)}"
    )


def refuse_changed(own: Sequence[str], stored: Sequence[str], split: str) -> None:
    """Raises DataError if the training split's classes are not those that the run began with.

    Args:
        own: classes of the training split now.
        stored: classes that the run began with.
        split: name of the split.
    """
    if tuple(own) == tuple(stored):
        return
    new, gone = [name for name in own if name not in stored], [name for name in stored if name not in own]
    parts = [f"{word} {listed(names)}" for word, names in (("new:", new), ("missing:", gone)) if names]
    if not parts:
        place = next(number for number, (a, b) in enumerate(zip(own, stored, strict=False)) if a != b)
        parts = [f"class {place} is '{own[place]}' now, '{stored[place]}' there"]
    raise DataError(
        f"split '{split}' has other classes than the {CLASSES_FILE} that the run began with ({len(stored):,}): "
        f"{'; '.join(parts)}; put the folders back, or choose another output_dir"
    )


def missing_note(present: Sequence[str], names: Sequence[str], split: str) -> list[str]:
    """Returns a line about classes of which a split has no images; none if it has all.

    Args:
        present: classes of the split.
        names: of the class map.
        split: name of the split.
    """
    there = set(present)
    missing = [name for name in unpadded(names) if name not in there]
    if not missing:
        return []
    return [f"split '{split}': no images of {len(missing):,} of {len(unpadded(names)):,} classes: {listed(missing)}"]


def refuse_label(label: int, count: int | None, split: str, image: str) -> NoReturn:
    """Raises DataError for a label that is no number of a class.

    Args:
        label: of the image.
        count: number of classes; None where it does not matter, for labels below 0.
        split: name of the split.
        image: its path, or "image 17".
    """
    if label < 0:
        raise DataError(
            f"split '{split}': label {label} of {image}: labels begin with 0; a split without labels (tests often have -1) "
            "can't be trained or evaluated on"
        )
    raise DataError(
        f"split '{split}': label {label} of {image}, but there are {count:,} classes, 0 to {(count or 1) - 1}; set "
        f"model.num_classes, or data.class_map"
    )
