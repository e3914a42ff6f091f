"""Files that name the class of each image: Tiny-ImageNet's annotations, ImageNet's validation labels, and CSV files."""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vit_tucker.data.naming import listed
from vit_tucker.errors import DataError, nearest, one_line

TINY_FILE = "val_annotations.txt"
KAGGLE_FILE = "LOC_val_solution.csv"
TRUTH_FILE = "ILSVRC2012_validation_ground_truth.txt"
META_FILE = "meta.mat"
DEVKIT = ("", "ILSVRC2012_devkit_t12/data", "devkit/data", "data")
"""Where ImageNet's development kit has the ground truth, below a folder."""


def find_label_file(folder: Path, root: Path) -> Path | None:
    """Finds the labels of a flat ImageNet validation folder: beside the images, or in a folder above them.

    Args:
        folder: of the split.
        root: of the data set; the folder above it is searched too, and in Kaggle's tree (ILSVRC/Data/CLS-LOC) those up to its
            top.
    """
    top = root.resolve().parent
    if root.resolve().name == "CLS-LOC":
        top = root.resolve().parents[min(2, len(root.resolve().parents) - 1)]
    for place in (folder.resolve(), *folder.resolve().parents):
        if (file := place / KAGGLE_FILE).is_file():
            return file
        for below in DEVKIT:
            if (file := place / below / TRUTH_FILE).is_file():
                return file
        if place == top:
            break
    return None


def tiny_labels(file: Path) -> dict[str, str]:
    """Reads Tiny-ImageNet's val_annotations.txt: file name, class and a box in each line; returns each file's class.

    Raises:
        DataError: a line is something else.
    """
    labels = {}
    for number, line in enumerate(lines_of(file), 1):
        parts = line.split("\t") if "\t" in line else line.split()
        if len(parts) < 2:
            raise DataError(f"{file}:{number}: expected a file name, a tab and a class, found '{line[:60]}'")
        labels[parts[0].strip()] = parts[1].strip()
    return labels


def kaggle_labels(file: Path) -> dict[str, str]:
    """Reads Kaggle's LOC_val_solution.csv, a class and boxes for each name without ending; returns each name's class."""
    rows = csv_rows(file, ("ImageId", "PredictionString"))
    return {image: boxes.split()[0] for image, boxes in rows if boxes.split()}


def truth_labels(file: Path, images: Sequence[str]) -> dict[str, str]:
    """Reads ILSVRC2012_validation_ground_truth.txt: the number of the class of image 1, 2, ... in each line.

    Args:
        file: with meta.mat of the development kit beside it, which names the classes.
        images: names that end with the image's number, ILSVRC2012_val_00000001.JPEG.

    Returns:
        The class (a WordNet ID) of each of them.

    Raises:
        DataError: another format, or meta.mat is missing.
    """
    meta = file.parent / META_FILE
    if not meta.is_file():
        raise DataError(
            f"{file} has numbers of classes; {META_FILE} of ImageNet's development kit, which names them, is not beside it"
        )
    names = synsets(meta)
    numbers = lines_of(file)
    labels = {}
    for image in images:
        found = re.search(r"(\d+)\.\w+$", image)
        line = int(found[1]) if found else 0
        if not 1 <= line <= len(numbers):
            raise DataError(f"{file} has {len(numbers):,} lines, none for image {image}")
        try:
            labels[image] = names[int(numbers[line - 1])]
        except (ValueError, KeyError):
            raise DataError(f"{file}:{line}: '{numbers[line - 1][:40]}' is no number of a class in {meta}") from None
    return labels


def synsets(meta: Path) -> dict[int, str]:
    """Reads meta.mat of ImageNet's development kit; returns the WordNet ID of each ILSVRC2012_ID.

    Raises:
        DataError: it is another file.
    """
    from scipy.io import loadmat  # type: ignore[import-untyped]  # comes with scikit-learn

    try:
        table: Any = loadmat(str(meta), squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
    except Exception as error:  # whatever a damaged file makes of it
        raise DataError(
            f"{meta}: not the table of synsets of ImageNet's development kit: {type(error).__name__}"
        ) from None


def csv_labels(file: Path, columns: tuple[str, str]) -> dict[str, str]:
    """Reads a CSV file with a header.

    Args:
        file: separated by commas, semicolons or tabs; UTF-8, with or without a byte order mark.
        columns: names of the columns of file names and of labels.

    Returns:
        The label of each file name, as text.

    Raises:
        DataError: a column is missing, a file has two different labels, or none.
    """
    labels: dict[str, str] = {}
    for name, label in csv_rows(file, columns):
        key = name.strip().replace("\\", "/").removeprefix("./")
        if not label.strip():
            raise DataError(f"{file}: no label for {key or 'a row without a file name'}")
        if labels.setdefault(key, label.strip()) != label.strip():
            raise DataError(f"{file}: {key} is there twice, as '{labels[key]}' and '{label.strip()}'")
    if not labels:
        raise DataError(f"{file}: has no rows")
    return labels


def csv_rows(file: Path, columns: tuple[str, str]) -> Iterable[tuple[str, str]]:
    """Yields two columns of a CSV file with a header, row by row.

    Raises:
        DataError: no header, no such column, or a row of another length.
    """
    lines = lines_of(file)
    if not lines:
        raise DataError(f"{file}: is empty; expected a header with the columns {columns[0]}, {columns[1]}")
    separator = max(",;\t", key=lines[0].count)
    header = [name.strip() for name in next(csv.reader(lines[:1], delimiter=separator))]
    for column in columns:
        if column not in header:
            raise DataError(
                f"{file}: has no column '{column}', only {listed(header, 6)}; set data.label_columns: [filename, label]"
                f"{nearest(column, header)}"
            )
    places = [header.index(column) for column in columns]
    for number, row in enumerate(csv.reader(lines[1:], delimiter=separator), 2):
        if len(row) <= max(places):
            raise DataError(f"{file}:{number}: has {len(row)} columns, the header has {len(header)}")
        yield row[places[0]], row[places[1]]


def lines_of(file: Path) -> list[str]:
    """Returns the lines of a UTF-8 file that are not blank, without their ends; raises DataError if it can't be read."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: can't be read as text: {one_line(error, 120)}") from None
    return [line for line in text.splitlines() if line.strip()]
