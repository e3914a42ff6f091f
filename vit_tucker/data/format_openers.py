"""Data sets that are read by their columns or keys: Hugging Face's `datasets` and webdataset."""

from collections.abc import Callable
from typing import Any

from vit_tucker.data.column_sets import open_columns
from vit_tucker.data.column_streams import open_column_stream
from vit_tucker.data.shards import open_shards
from vit_tucker.data.split_source import SplitSource

OPENERS: dict[str, Callable[[SplitSource], Any]] = {
    "hfds": open_columns,
    "hfids": open_column_stream,
    "wds": open_shards,
}


def has_opener(name: str) -> bool:
    """Returns whether a data set, by its name in a config, is of these formats."""
    return name.partition("/")[0].lower() in OPENERS and "/" in name


def open_source(source: SplitSource) -> Any:
    """Opens a split: map-style, or a ``Stream``; labels and columns are checked, no image is decoded.

    Raises:
        DataError: it is missing or malformed.
    """
    return OPENERS[source.name.partition("/")[0].lower()](source)
