"""Image folders of the layouts that people have, small."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from vit_tucker.config.schema import DataConfig
from vit_tucker.data.splits import open_split

COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}


def image(file: Path, colour=(9, 9, 9), size=(8, 8)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)
    return file


def tree(root: Path, files) -> Path:
    """Images by their paths below a folder."""
    for name in files:
        image(root / name)
    return root


def write_csv(file: Path, header, rows, bom=False, delimiter=","):
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8-sig" if bom else "utf-8", newline="") as out:
        csv.writer(out, delimiter=delimiter).writerows([header, *rows])
    return file


def folder_config(root, **data):
    return DataConfig(**{"dataset": "folder", "root": str(root), "num_workers": 0, **data})


def opened(root, split="train", **data):
    config = folder_config(root, **data)
    return open_split(config, split, split == "train", 3)


def classes_of(dataset) -> dict[str, str]:
    """The name of the class of each image, by its path in the split."""
    return {name: dataset.class_names[label] for name, label in zip(dataset.images, dataset.labels, strict=True)}


def write_meta(folder: Path, names) -> None:
    """meta.mat of ImageNet's development kit: a struct array of synsets, leaves first."""
    from scipy.io import savemat

    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "f8")]
    rows = [(float(number), name, f"the {name}", "", 0.0) for number, name in names.items()]
    rows.append((1001.0, "n99999999", "an inner node", "", 2.0))
    folder.mkdir(parents=True, exist_ok=True)
    savemat(folder / "meta.mat", {"synsets": np.array(rows, dtype=kinds)[:, None]})
