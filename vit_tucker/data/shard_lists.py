"""Lists the shards that a split of a webdataset has, by the _info.json beside them or by a pattern of their names."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_tucker.data.columns import nearest_split
from vit_tucker.data.naming import listed
from vit_tucker.data.split_source import SplitSource
from vit_tucker.errors import DataError, one_line

INFO_FILES = ("_info.json", "info.json")
CLASS_NAMES = "class_names"
"""Key of an _info.json that lists the names of the classes."""
PLAIN = re.compile(r"[\w.~:/?@+,=%-]+", re.ASCII)
"""Addresses without what a shell interprets inside quotes: some versions of webdataset hand them to one."""


@dataclass(frozen=True)
class ShardList:
    """The shards of a split.

    Attributes:
        files: paths or addresses.
        size: samples in them; None if unknown.
        label_field: of each sample's json, where the _info.json says that the label is there ("alt_label").
        class_names: in the order of their numbers; None if the _info.json does not list them.
    """

    files: list[str]
    size: int | None
    label_field: str | None = None
    class_names: tuple[str, ...] | None = None


def list_shards(source: SplitSource) -> ShardList:
    """Returns the shards of a split: one of the _info.json by exactly its name, or timm's "train-{0000..0003}.tar|5".

    Raises:
        DataError: no such split, no _info.json, or one of another format.
    """
    info = read_info(source.root)
    splits = info.get("splits", {})
    names = info_names(info)
    if ".tar" in source.split or "{" in source.split:
        return shards_by_pattern(source, splits, names)
    if not splits:
        tars = sorted(file.name for file in source.root.glob("*.tar"))
        there = f"; there are {listed(tars)}" if tars else ""
        raise DataError(
            f"{source.where}: no {INFO_FILES[0]} in {source.root} lists its shards; name them by a pattern, with the number of "
            f"samples: '{source.split}-{{0000..0003}}.tar|5000'{there}"
        )
    if source.split not in splits:
        raise DataError(
            f"{source.name} {source.root} has no split '{source.split}', there are: {', '.join(splits)}"
            f"{nearest_split(source.split, list(splits))}"
        )
    split = splits[source.split]
    files = split.get("filenames") if isinstance(split, Mapping) else None
    if not isinstance(files, list) or not files:
        raise DataError(f"{source.where}: the {INFO_FILES[0]} in {source.root} lists no 'filenames' of it")
    size = split.get("num_samples") or sum(split.get("shard_lengths") or ())
    return ShardList(absolute_shards(source.root, files), size or None, split.get("alt_label") or None, names)


def shards_by_pattern(source: SplitSource, splits: Mapping[str, Any], names: tuple[str, ...] | None) -> ShardList:
    """Returns the shards that a pattern names; their number of samples follows it, or is that of the _info.json.

    Args:
        source: what is read; its split is the pattern, as in "train-{000..099}.tar|12345".
        splits: those of the _info.json, by name.
        names: of the classes, None if unknown.

    Raises:
        DataError: it is no pattern, or has no number behind "|".
    """
    from webdataset.shardlists import expand_urls

    pattern, _, count = source.split.partition("|")
    if count and not count.strip().isdigit():
        raise DataError(f"{source.where}: expected a number of samples after '|', found '{count}'")
    try:
        files = list(expand_urls(pattern))
    except Exception as error:
        raise DataError(f"{source.where}: no pattern of shards: {error}") from None
    lengths = {
        file: (length, split.get("alt_label") or None)
        for split in splits.values()
        for file, length in zip(split.get("filenames", ()), split.get("shard_lengths", ()), strict=False)
    }
    known = [lengths[file] for file in files if file in lengths]
    size = sum(length for length, _ in known) if len(known) == len(files) else None
    field = known[0][1] if known else None
    return ShardList(absolute_shards(source.root, files), int(count) if count else size, field, names)


def absolute_shards(root: Path, files: list[str]) -> list[str]:
    """Returns shards as they are opened, named from the root; raises DataError where webdataset would run a command."""
    shards = [os.path.join(root, str(file)) for file in files]
    for shard in shards:
        scheme, colon, _ = shard.partition(":")
        if colon and scheme.isalnum() and (scheme == "pipe" or not PLAIN.fullmatch(shard)):
            raise DataError(f"{shard!r:.200}: no shard: a path or plain address is needed, and no command is run")
    return shards


def read_info(root: Path) -> dict[str, Any]:
    """Returns the content of the _info.json in a folder, empty without one; raises DataError if it can't be read."""
    file = next((root / name for name in INFO_FILES if (root / name).is_file()), None)
    if file is None:
        return {}
    try:
        info = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: can't be read: {one_line(error)}") from None
    if not isinstance(info, dict) or not isinstance(info.get("splits", {}), dict):
        raise DataError(f"{file}: expected an object with 'splits'")
    return info


def info_names(info: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Returns the class names of an _info.json, in the order of their numbers; None if it has none."""
    names = info.get(CLASS_NAMES)
    return tuple(map(str, names)) if isinstance(names, list) and names else None
