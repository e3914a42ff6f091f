"""Labels as a file has them -> numbers of classes, for data sets that are no image folders."""

import operator
from collections.abc import Mapping, Sequence
from typing import NoReturn

import numpy as np

from vit_tucker.data.classes import names_of, refuse_label
from vit_tucker.data.naming import listed
from vit_tucker.data.split_source import Raw
from vit_tucker.errors import DataError, nearest


class Targets:
    """The class numbers of a split's labels; by name wherever both the labels and the classes have names.

    Args:
        source: of the labels, for messages: "column 'label' of hfds/x".
        split: its name.
        names: of the numbers that the file has, in their order; None if numbers have no names there.
        classes: of the run, in the order of their numbers; None if the file's own numbers are the classes.
        class_map: number of each name or stored number, as ``data.class_map``; goes before all else.
        num_classes: of the model; None if it may be any.
    """

    def __init__(
        self,
        source: str,
        split: str,
        names: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        class_map: Mapping[str, int] | None = None,
        num_classes: int | None = None,
    ) -> None:
        self.source, self.split, self.names, self.classes = source, split, names, classes
        self.class_map, self.num_classes = class_map, num_classes
        self.by_name = {name: number for number, name in enumerate(classes)} if classes is not None else {}
        if classes is not None and len(self.by_name) != len(classes):
            double = next(name for number, name in enumerate(classes) if self.by_name[name] != number)
            raise DataError(f"{self.where}: the class '{double}' has two numbers")

    def number(self, raw: Raw, where: str) -> int:
        """Returns the class number of one label.

        Args:
            raw: a number or a name.
            where: which sample, for the message: "image 3", "sample 0001 in a.tar".

        Raises:
            DataError: no label, an unknown name, or a number beyond the classes.
        """
        if self.class_map is not None:
            return self._in_range(self._mapped(raw, where), where)
        if isinstance(raw, str):
            return self._in_range(self._named(raw, where), where)
        if self.names is None:
            return self._in_range(raw, where)
        if not 0 <= raw < len(self.names):
            self.refuse(raw, len(self.names), where)
        return self._in_range(raw if self.classes is None else self._named(self.names[raw], where), where)

    @property
    def where(self) -> str:
        """Returns the name of the split in messages."""
        return f"{self.source}, split '{self.split}'"

    def refuse(self, number: int, count: int | None, where: str) -> NoReturn:
        """Raises DataError for a label that is no number of a class, see ``refuse_label``.

        Args:
            number: the label.
            count: number of classes, None if unknown.
            where: the image, for the message.
        """
        refuse_label(number, count, self.split, f"{where} ({self.source})")

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, in the order of their numbers; None if unknown."""
        if self.class_map is not None:
            return names_of(self.class_map)
        return tuple(self.classes) if self.classes is not None else None

    def _mapped(self, raw: Raw, where: str) -> int:
        assert self.class_map is not None
        key = self.mapped_key(raw)
        if key is None:
            name = self.name_of(raw)
            near = nearest(name, self.class_map)
            raise DataError(f"{self.where}: {where} has the label '{name}', which data.class_map lacks{near}")
        return self.class_map[key]

    def mapped_key(self, raw: Raw) -> str | None:
        """Returns the key of the class map that a label is under, its name before its number; None if it is under none."""
        assert self.class_map is not None
        return next((key for key in (self.name_of(raw), str(raw)) if key in self.class_map), None)

    def name_of(self, raw: Raw) -> str:
        """Returns the name that the file has for a label; the label itself where it has none."""
        named = self.names is not None and isinstance(raw, int) and 0 <= raw < len(self.names)
        return self.names[raw] if named else str(raw)  # type: ignore[index]

    def _named(self, name: str, where: str) -> int:
        if self.classes is None:
            raise DataError(
                f"{self.where}: {where} has the label '{name}', a name without a number; set data.class_map"
            )
        if name not in self.by_name:
            raise DataError(
                f"{self.where}: {where} is of class '{name}', which is none of the {len(self.classes)} classes of the training "
                f"split ({listed(self.classes)}){nearest(name, self.classes)}"
            )
        return self.by_name[name]

    def _in_range(self, number: int, where: str) -> int:
        if number < 0 or (self.num_classes is not None and number >= self.num_classes):
            self.refuse(number, self.num_classes, where)
        return number


def label_numbers(targets: Targets, raw: Sequence[Raw]) -> np.ndarray:
    """Returns the class numbers of a whole column, each different label looked up once.

    Args:
        targets: of the split.
        raw: all labels, in the order of the images.

    Returns:
        (n,) int64.

    Raises:
        DataError: see ``Targets.number``; names the first image and how many have the same label.
    """
    values, first, inverse, counts = np.unique(
        np.asarray(raw), return_index=True, return_inverse=True, return_counts=True
    )
    numbers = []
    for value, index, count in sorted(
        zip(values.tolist(), first.tolist(), counts.tolist(), strict=True), key=operator.itemgetter(1)
    ):
        more = f" (and {count - 1} more)" if count > 1 else ""
        numbers.append((value, targets.number(value, f"image {index}{more}")))
    table = dict(numbers)
    return np.array([table[value] for value in values.tolist()], dtype=np.int64)[inverse.reshape(-1)]
