"""A split of a data set that is no image folder: its name and options, and how its images and labels are read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vit_tucker.data.image_files import ImageOptions
from vit_tucker.errors import DataError, nearest

Raw = int | str
"""A label as a file has it."""
OWN_OPTIONS = ("download", "batch_size", "seed", "class_map")
"""What loaders pass beside the user's ``data.dataset_kwargs``."""


@dataclass(frozen=True)
class SplitSource:
    """A split of a data set, and how to read it.

    Attributes:
        name: of the data set, with its prefix: "hfds/cifar100".
        split: to open.
        train_split: whose names of classes are the run's.
        mode: PIL mode of the images, "L" or "RGB".
        images: how stored images are read.
        root: folder of the data sets.
        options: ``data.dataset_kwargs`` and what the loaders pass.
        classes: of the run, in the order of their numbers; those of the training split if None.
        num_classes: of the model: a label beyond it is refused; None if it may be any.
        class_map: number of each name or stored number; None: the files' own numbers, or by name.
    """

    name: str
    split: str
    train_split: str
    mode: str
    root: Path
    images: ImageOptions = field(default_factory=ImageOptions)
    options: dict[str, Any] = field(default_factory=dict)
    classes: Sequence[str] | None = None
    num_classes: int | None = None
    class_map: Mapping[str, int] | None = None

    @property
    def where(self) -> str:
        """Returns the name of the split in messages."""
        return f"{self.name}, split '{self.split}'"

    def cant_open(self, error: BaseException) -> DataError:
        """Returns the error for a data set that the library which reads it refuses."""
        text = reason(error)
        hint = "; open it by datasets.load_from_disk and write a file of each split by to_parquet"
        return DataError(
            f"data set '{self.name}' (split '{self.split}', folder {self.root}) can't be opened: {text}"
            f"{hint if 'load_from_disk' in text else ''}"
        )

    def check_options(self, known: Iterable[str]) -> None:
        """Raises DataError for entries of ``data.dataset_kwargs`` that are none of the format's known ones."""
        names = tuple(known)
        for name, value in self.options.items():
            if name not in (*names, *OWN_OPTIONS, "trust_remote_code") and value is not None:
                prefix = self.name.partition("/")[0]
                raise DataError(
                    f"data.dataset_kwargs: {prefix}/ has no option '{name}', known: {', '.join(sorted(names))}"
                    f"{nearest(name, names)}"
                )

    def count(self, name: str) -> int | None:
        """Returns an option that is a positive number, None if it isn't set; raises DataError for anything else."""
        value = self.options.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataError(f"data.dataset_kwargs.{name}: expected a number of at least 1, found {value!r}")
        return value


def refuse_remote_code(options: dict[str, Any]) -> None:
    """Raises DataError if ``trust_remote_code`` is set: data sets are read, nothing of them is executed."""
    if options.get("trust_remote_code"):
        raise DataError(
            "data.dataset_kwargs.trust_remote_code: code of a data set is never run; leave it out, and use a data set of parquet "
            "or image files"
        )


def reason(error: BaseException) -> str:
    """Returns one line for an error: the first line of what caused it in the first place."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0].rstrip(".") if lines else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
