"""Names of classes and splits: their order, those that mean the same, and lists of them in messages."""

import re
from collections.abc import Collection, Iterable

SHOWN = 3
TRAIN_SPLITS = ("train", "training")
VALIDATION_SPLITS = ("val", "valid", "validation", "eval", "evaluation")
"""Names that mean the same split, as in timm; the first of them whose folder is there is read."""
DIGITS = re.compile(r"(\d+)")


def natural_key(name: str) -> list[str | int]:
    """Returns the key by which timm sorts names: digits of any script as numbers, upper and lower case alike."""
    parts: list[str | int] = list(DIGITS.split(name.lower()))
    parts[1::2] = [int(part) for part in parts[1::2]]
    return parts


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Returns distinct names in natural order; those that are equal in it ('A' and 'a', '1' and '01') by their characters."""
    return tuple(sorted(set(names), key=lambda name: (natural_key(name), name)))


def listed(names: Collection[object], shown: int = SHOWN) -> str:
    """Returns the first names of a list, and how many more there are: 'a, b, c (and 7 more)'."""
    first = ", ".join(str(name) for name, _ in zip(names, range(shown), strict=False))
    return f"{first} (and {len(names) - shown:,} more)" if len(names) > shown else first
