"""Finds the image and the label in the files of a webdataset's sample."""

import json
from collections.abc import Mapping
from typing import Any

from vit_tucker.data.columns import LABEL_WORDS, likeness
from vit_tucker.data.image_files import image_endings
from vit_tucker.data.split_source import Raw, SplitSource
from vit_tucker.errors import DataError

LABEL_KEY, FIELDS_KEY = "cls", "json"
TEXT_KEYS = ("txt", "text", "label", "class")
"""Endings of files that may hold a label."""


def keys_of(sample: Mapping[str, Any]) -> list[str]:
    """Returns the endings of a sample's files, lower case."""
    return [key for key in sample if not key.startswith("__")]


def image_keys(sample: Mapping[str, Any]) -> list[str]:
    """Returns the endings that are of images: 'jpg' before 'mask.png' and the like."""
    keys = [key for key in keys_of(sample) if f".{key.rpartition('.')[2]}" in image_endings()]
    return [key for key in keys if "." not in key] or keys


class SampleError(ValueError):
    """A sample without an image or a label where they are looked for."""


def image_key(sample: Mapping[str, Any], source: SplitSource) -> str:
    """Returns the ending of a sample's image: one of ``input_key`` ("jpg;png"), or the only one of an image format.

    Raises:
        SampleError: there is none, or there are several.
    """
    given = source.options.get("input_key")
    found = image_keys(sample) if given is None else [key for key in str(given).lower().split(";") if key in sample]
    if len(found) > 1 and given is None:
        raise SampleError(f"several images, {', '.join(found)}")
    if not found:
        raise SampleError("no image" if given is None else f"no image '{given}'")
    return found[0]


def label_of(sample: Mapping[str, Any], source: SplitSource, label_field: str | None) -> Raw:
    """Returns the label of a sample: of its 'cls' file, of the file or the json field that ``target_key`` names.

    Args:
        sample: undecoded.
        source: what is read, and how.
        label_field: json field of the _info.json, where no ``target_key`` is given.

    Raises:
        SampleError: there is none. DataError: the label is neither a number nor a name.
    """
    field = source.options.get("target_key") or label_field
    if field is None or (field in sample and field != FIELDS_KEY):
        key = LABEL_KEY if field is None else str(field)
        if key not in sample:
            raise SampleError(f"no label '{key}'")
        return number_or_name(sample[key].decode("utf-8-sig").strip())
    fields = fields_of(sample)
    if field not in fields:
        raise SampleError(f"no label '{field}'" + (f" in its {FIELDS_KEY}" if FIELDS_KEY in sample else ""))
    value = fields[field]
    if isinstance(value, str):
        return number_or_name(value.strip())
    if isinstance(value, int):
        return int(value)
    kind = "a list" if isinstance(value, list | dict) else "no label" if value is None else f"{value}"
    raise DataError(
        f"{source.where}: {sample.get('__key__')} in {sample.get('__url__')} has {kind} in the field '{field}' of its "
        f"{FIELDS_KEY}, in the place of a class number or name"
    )


def number_or_name(text: str) -> Raw:
    """Returns a label as a number if it is one."""
    try:
        return int(text)
    except ValueError:
        return text


def fields_of(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a sample's json; none without one."""
    if FIELDS_KEY not in sample:
        return {}
    fields = json.loads(sample[FIELDS_KEY])
    return fields if isinstance(fields, dict) else {}


def check_sample(sample: Mapping[str, Any], source: SplitSource, label_field: str | None) -> None:
    """Raises DataError if the first sample of a split has no image or label where they are looked for.

    Args:
        sample, source, label_field: see ``label_of``.
    """
    faults = []
    settings = {name: source.options.get(name) for name in ("input_key", "target_key")}
    try:
        image_key(sample, source)
    except SampleError as error:
        faults.append(str(error))
        settings["input_key"] = next(iter(image_keys(sample)), None)
    try:
        label_of(sample, source, label_field)
    except DataError:
        raise
    except ValueError as error:
        faults.append(str(error))
        settings["target_key"] = guess_label(sample)
    if not faults:
        return
    advice = []
    if chosen := ", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None):
        advice.append(f"set data.dataset_kwargs={{{chosen}}}")
    dropped = [name for name, value in settings.items() if value is None and source.options.get(name) is not None]
    if dropped:
        advice.append(f"leave out {' and '.join(dropped)} of data.dataset_kwargs")
    fields = ", ".join(fields_of_any(sample))
    inside = f" (fields of the {FIELDS_KEY}: {fields})" if fields else ""
    raise DataError(
        f"{source.where}: the first sample ({sample.get('__key__')} in {sample.get('__url__')}) has the keys "
        f"{', '.join(keys_of(sample))}{inside}, but {' and '.join(faults)}"
        f"{''.join(f'; {part}' for part in advice)}"
    )


def fields_of_any(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a sample's json; none if it has none or a broken one."""
    try:
        return fields_of(sample)
    except ValueError:
        return {}


def guess_label(sample: Mapping[str, Any]) -> str | None:
    """Returns the ``target_key`` where the label most likely is; None for the 'cls' file that is the default."""
    if LABEL_KEY in sample:
        return None
    fields = {name: value for name, value in fields_of_any(sample).items() if isinstance(value, int | str)}
    if fields:
        return max(fields, key=lambda name: (likeness(name, LABEL_WORDS), isinstance(fields[name], int)))
    return next((key for key in keys_of(sample) if key in TEXT_KEYS), None)
