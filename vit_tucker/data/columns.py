"""Columns and splits of Hugging Face's `datasets`, looked at before anything is read."""

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_tucker.data.naming import listed
from vit_tucker.data.split_source import SplitSource
from vit_tucker.errors import DataError, how_to_install, nearest

IMAGE_KEY, LABEL_KEY = "image", "label"
BYTE_TYPES = ("binary", "large_binary")
STRING_TYPES = ("string", "large_string")
LABEL_TYPES = ("int", "uint", "bool", *STRING_TYPES)
LABEL_WORDS = ("label", "class", "target", "category")
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names of files and folders that `datasets` merges into one split."""


def load_by_datasets(function: str, source: SplitSource, **options: Any) -> Any:
    """Calls ``load_dataset`` or ``load_dataset_builder``, which finds the splits and files; executes nothing of a set.

    Args:
        function: its name.
        source: what is read.
        options: further arguments.

    Raises:
        DataError: `datasets` is not installed, or can't find or read the data set.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source.name}: needs the package datasets: {how_to_install('data')}") from None
    load = getattr(datasets, function)
    if "trust_remote_code" in inspect.signature(load).parameters:  # of datasets < 4; later ones can't
        options["trust_remote_code"] = False
    try:
        return load(source.name.partition("/")[2], cache_dir=str(source.root), **options)
    except Exception as error:
        raise source.cant_open(error) from error


def split_names(builder: Any) -> list[str]:
    """Returns the splits of a data set; empty if they are not known before it is read."""
    if builder.info.splits:
        return [str(name) for name in builder.info.splits]
    files = getattr(builder.config, "data_files", None)
    return [str(name) for name in files] if files else []


def base_splits(split: str) -> list[str]:
    """Returns the names in a split of `datasets`: train and test of "train[:10%]+test"."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def check_split(builder: Any, source: SplitSource) -> None:
    """Raises DataError for a split that is not there by exactly that name, or made of `val` and `validation` together."""
    known = split_names(builder)
    for name in base_splits(source.split):
        if known and name not in (*known, "all"):
            raise DataError(
                f"{source.name} has no split '{name}', there are: {', '.join(known)}{nearest_split(name, known)}"
            )
        files = local_files(builder, name)
        spellings = [spellings_of(file, SPLIT_WORDS.get(name, ())) for file in files]
        if spellings and all(spellings) and not set.intersection(*spellings):
            examples = {min(words): file for words, file in zip(spellings, files, strict=True)}
            raise DataError(
                f"{source.name}: split '{name}' would be made of files by different names, {listed(list(examples.values()))}; "
                "keep one of them, or name the files of each split in the data set's README.md (configs: data_files)"
            )


def nearest_split(name: str, known: Sequence[str]) -> str:
    """Returns '; did you mean X?' for the split of a similar meaning, else of a similar name."""
    for words in SPLIT_WORDS.values():
        if name in words and (alike := [split for split in known if split in words]):
            return f"; did you mean '{alike[0]}'?"
    return nearest(name, known)


def local_files(builder: Any, split: str) -> list[Path]:
    """Returns the files of a split that lie on this machine."""
    files = getattr(builder.config, "data_files", None) or {}
    return [path for file in files.get(split, ()) if "://" not in str(file) and (path := Path(str(file))).is_file()]


def spellings_of(file: Path, words: Iterable[str]) -> set[str]:
    """Returns which of some words the names of a file and its folder have in them."""
    parts = {part for name in (file.parent.name, file.name) for part in re.split(r"[^a-z]+", name.lower())}
    return parts & set(words)


def stored_names(builder: Any, source: SplitSource, key: str) -> tuple[str, ...] | None:
    """Returns the class names that the files of a split have themselves; None if they have none.

    `datasets` gives all splits the names of the first one's first file, whatever the files of the others say.

    Args:
        builder: of `datasets`.
        source: what is read.
        key: the label column.

    Raises:
        DataError: files of one split that differ.
    """
    found: dict[tuple[str, ...], Path] = {}
    for split in base_splits(source.split):
        for file in local_files(builder, split):
            if (names := file_names(file, key)) is not None:
                found.setdefault(names, file)
    if len(found) > 1:
        (first, file), (second, other) = list(found.items())[:2]
        raise DataError(
            f"{source.where}: column '{key}' numbers its classes in {file.name} as {listed(first)}, in {other.name} as "
            f"{listed(second)}; write them anew with one ClassLabel"
        )
    return next(iter(found), None)


def file_names(file: Path, key: str) -> tuple[str, ...] | None:
    """Returns the names of the ClassLabel that a parquet or arrow file has for a column; None without one."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features

    try:
        if file.suffix == ".parquet":
            schema = pq.read_schema(file)
        elif file.suffix == ".arrow":
            with pa.memory_map(str(file)) as stream:
                schema = pa.ipc.open_stream(stream).schema
        else:
            return None
        names = getattr(Features.from_arrow_schema(schema).get(key), "names", None)
    except Exception:  # a file that can't be read: reading it will say so
        return None
    return tuple(names) if names is not None else None


def check_columns(features: Mapping[str, Any], source: SplitSource) -> None:
    """Raises DataError if the columns that ``input_key`` and ``target_key`` name are not there or of another type.

    Args:
        features: types of the split's columns, by name.
        source: the split.
    """
    image_key, label_key = columns_of(source)
    faults = []
    if image_key not in features:
        faults.append(f"has no column '{image_key}' for the images")
    elif not holds_images(features[image_key]):
        faults.append(f"has no images in column '{image_key}' but {type_text(features[image_key])}")
    if label_key not in features:
        faults.append(f"has no column '{label_key}' for the labels")
    elif not holds_labels(features[label_key]):
        faults.append(f"has no class numbers or names in column '{label_key}' but {type_text(features[label_key])}")
    if not faults:
        return
    columns = ", ".join(f"{name} ({type_text(feature)})" for name, feature in features.items())
    image = image_key if holds_images(features.get(image_key)) else guess_image(features)
    label = label_key if holds_labels(features.get(label_key)) else guess_label(features, {image, image_key})
    chosen = {"input_key": (image, IMAGE_KEY), "target_key": (label, LABEL_KEY)}
    setting = ", ".join(f"{key}: {name}" for key, (name, default) in chosen.items() if name not in (None, default))
    lacking = [what for what, name in (("images", image), ("labels", label)) if name is None]
    advice = f"; set data.dataset_kwargs={{{setting}}}" if setting else ""
    if lacking:
        advice += f"; no column can be its {' or '.join(lacking)}"
    raise DataError(f"{source.where} {' and '.join(faults)}; its columns are: {columns or 'none'}{advice}")


def columns_of(source: SplitSource) -> tuple[str, str]:
    """Returns the names of the columns of images and labels."""
    return str(source.options.get("input_key") or IMAGE_KEY), str(source.options.get("target_key") or LABEL_KEY)


def holds_images(feature: Any) -> bool:
    """Returns whether a column can hold images: of `datasets`' Image type, bytes of files, or paths."""
    if isinstance(feature, Mapping):
        return {"bytes", "path"} <= set(feature)
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", None) in (*BYTE_TYPES, *STRING_TYPES)


def holds_labels(feature: Any) -> bool:
    """Returns whether a column can hold labels: class numbers or names."""
    if type(feature).__name__ == "ClassLabel":
        return True
    return type(feature).__name__ == "Value" and re.sub(r"\d+$", "", str(feature.dtype)) in LABEL_TYPES


def guess_image(features: Mapping[str, Any]) -> str | None:
    """Returns the column that the images are most likely in: by its type, the nearest name of several."""
    typed = [key for key, feature in features.items() if type(feature).__name__ == "Image"]
    files = [key for key, feature in features.items() if getattr(feature, "dtype", None) in BYTE_TYPES]
    pairs = [key for key, feature in features.items() if isinstance(feature, Mapping) and holds_images(feature)]
    return max(typed or pairs or files, key=lambda key: likeness(key, (IMAGE_KEY,)), default=None)


def guess_label(features: Mapping[str, Any], images: set[str | None]) -> str | None:
    """Returns the column that the labels are most likely in: a ClassLabel before plain numbers and names."""
    fitting = [key for key, feature in features.items() if key not in images and holds_labels(feature)]
    typed = [key for key in fitting if type(features[key]).__name__ == "ClassLabel"]
    return max(typed or fitting, key=lambda key: likeness(key, LABEL_WORDS), default=None)


def likeness(name: str, words: Iterable[str]) -> float:
    """Returns how near a name is to the nearest of some words, 0 to 1."""
    return max(difflib.SequenceMatcher(None, word, name.lower()).ratio() for word in words)


def type_text(feature: Any) -> str:
    """Returns a column's type in a word or two."""
    kind = type(feature).__name__
    if kind == "ClassLabel":
        return f"ClassLabel of {len(feature.names)}" if feature.names else "ClassLabel"
    if kind == "Value":
        return str(feature.dtype)
    inner = getattr(feature, "feature", None)
    if isinstance(feature, list):
        return "list"
    return f"{kind} of {type_text(inner)}" if inner is not None and not isinstance(inner, Mapping) else kind
