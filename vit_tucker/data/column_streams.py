"""Hugging Face's `datasets`, streamed (hfids/)."""

import inspect
import random
from collections.abc import Iterator
from typing import Any

from PIL import Image

from vit_tucker.data import columns
from vit_tucker.data.class_numbers import Targets
from vit_tucker.data.column_sets import MAP_OPTIONS, plain, read_stored, split_targets, stored_name, undecoded
from vit_tucker.data.split_source import SplitSource
from vit_tucker.data.stream_base import Record, Share, Stream
from vit_tucker.errors import DataError

STREAM_OPTIONS = (*MAP_OPTIONS, "num_samples", "shuffle_size")
SHUFFLE_BUFFER = 4096
MIXED_SHARDS = 10
"""Shards that the shuffle buffer of datasets >= 5 is filled from, at most."""


class ColumnStream(Stream):
    """A streamed set of `datasets`; shards go to processes and loader workers as a whole where there are enough.

    Args:
        builder: of the data set.
        source: what is read, and how.
        targets: of its labels.
        size: images of the split; None if unknown.
    """

    def __init__(self, builder: Any, source: SplitSource, targets: Targets, size: int | None) -> None:
        super().__init__(source.split, size, int(source.options.get("batch_size") or 1), targets.class_names)
        self.builder, self.source, self.targets = builder, source, targets
        self.key, self.label_key = columns.columns_of(source)

    def rows(self, share: Share, generator: random.Random, record: Record) -> Iterator[Any]:
        """Yields the undecoded samples of a share, by the shards and the shuffle buffer of `datasets`."""
        from datasets.distributed import split_dataset_by_node

        if self.source.options.get("download"):  # cut to as many shards as there are readers
            stream = self.builder.as_dataset(split=self.split).to_iterable_dataset(num_shards=share.count)
        else:
            stream = self.builder.as_streaming_dataset(split=self.split)
        if share.seed is not None:
            buffer = self.source.count("shuffle_size") or SHUFFLE_BUFFER
            seed = int(self.source.options.get("seed") or 0)
            stream = stream.shuffle(seed=seed, buffer_size=buffer, **shuffle_options(stream, share.count))
        stream = split_dataset_by_node(self._undecoded(stream), rank=share.rank, world_size=share.world_size)
        stream.set_epoch(share.epoch)
        return enumerate(stream)  # `datasets` gives each loader worker shards of its own

    def ordered(self, record: Record) -> Iterator[Any]:
        """Yields all undecoded samples in the order of the files."""
        downloaded = self.source.options.get("download")
        opened = self.builder.as_dataset if downloaded else self.builder.as_streaming_dataset
        batches = self._undecoded(opened(split=self.split)).iter(batch_size=1)  # whose reading knows no loader workers
        return enumerate({name: values[0] for name, values in batch.items()} for batch in batches)

    def _undecoded(self, stream: Any) -> Any:
        return undecoded(with_features(stream).select_columns([self.key, self.label_key]), self.key)

    def label(self, row: Any) -> int:
        """Returns the class number of a sample, raising DataError for an unlabelled one."""
        raw = row[1][self.label_key]
        if raw is None:
            raise DataError(f"{self.targets.where}: {self.name(row)} has no label; unlabelled images can't be used")
        return self.targets.number(plain(raw), self.name(row))

    def image(self, row: Any) -> Image.Image:
        """Returns the decoded image of a sample."""
        return read_stored(row[1][self.key], self.source)

    def name(self, row: Any) -> str:
        """Returns the file name of a sample, or its number in the stream."""
        return stored_name(row[1][self.key]) or f"image {row[0]} of the stream"


def open_column_stream(source: SplitSource) -> ColumnStream:
    """Opens a split of a streamed set, checking its columns but reading no image; raises DataError as ``open_columns`` does."""
    source.check_options(STREAM_OPTIONS)
    builder = columns.load_by_datasets("load_dataset_builder", source)
    columns.check_split(builder, source)
    try:
        if source.options.get("download"):
            builder.download_and_prepare()
        features = with_features(builder.as_streaming_dataset(split=source.split)).features
    except Exception as error:
        raise source.cant_open(error) from error
    columns.check_columns(features, source)
    _, label_key = columns.columns_of(source)
    targets = split_targets(builder, source, features[label_key], None)
    known = (builder.info.splits or {}).get(source.split)
    size = source.count("num_samples") or getattr(known, "num_examples", None) or None
    return ColumnStream(builder, source, targets, size)


def with_features(stream: Any) -> Any:
    """Returns a stream with the types of its columns, inferred from its first samples if the set does not state them."""
    return stream if stream.features is not None else stream._resolve_features()


def shuffle_options(stream: Any, readers: int) -> dict[str, int]:
    """Returns how many shards datasets >= 5 may fill its shuffle buffer from, so that each reader still gets one of its own."""
    if "max_buffer_input_shards" not in inspect.signature(stream.shuffle).parameters:
        return {}
    return {"max_buffer_input_shards": max(1, min(MIXED_SHARDS, (getattr(stream, "num_shards", 1) or 1) // readers))}
