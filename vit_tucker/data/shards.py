"""webdataset (wds/): tar shards, one sample after the other, with or without an _info.json that lists them."""

import io
import random
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from vit_tucker.data.class_numbers import Targets
from vit_tucker.data.faults import fault_line
from vit_tucker.data.image_files import to_mode
from vit_tucker.data.sample_keys import check_sample, image_key, label_of
from vit_tucker.data.shard_lists import ShardList, list_shards
from vit_tucker.data.split_source import SplitSource, reason
from vit_tucker.data.stream_base import Record, Share, Stream
from vit_tucker.errors import DataError, how_to_install

OPTIONS = ("input_key", "target_key", "num_samples", "sample_shuffle_size", "sample_initial_size")
SHARD_BUFFER, SHARD_START = 500, 100
SAMPLE_BUFFER, SAMPLE_START = 8192, 2048


class ShardStream(Stream):
    """A webdataset; whole shards go to processes and loader workers.

    Args:
        source: what is read, and how.
        shards: of the split.
        targets: of its labels.
    """

    def __init__(self, source: SplitSource, shards: ShardList, targets: Targets) -> None:
        size = source.count("num_samples") or shards.size
        super().__init__(source.split, size, int(source.options.get("batch_size") or 1), targets.class_names)
        self.source, self.shards, self.targets = source, shards, targets

    def rows(self, share: Share, generator: random.Random, record: Record) -> Iterator[Any]:
        """Yields the undecoded samples of a share, shuffled by webdataset."""
        import webdataset as wds

        files, stages = self.shards.files, []
        if share.seed is not None:
            seed = int(self.source.options.get("seed") or 0)
            before = share.epoch - 1  # it counts on by itself
            files = list(wds.detshuffle(SHARD_BUFFER, SHARD_START, seed=seed, epoch=before).run(iter(files)))
            buffer = self.source.count("sample_shuffle_size") or SAMPLE_BUFFER
            start = self.source.count("sample_initial_size") or SAMPLE_START
            stages = [wds.shuffle(buffer, initial=start, rng=generator)]
        return self._samples(files[share.number :: share.count], record, stages)

    def ordered(self, record: Record) -> Iterator[Any]:
        """Yields all undecoded samples in the order of the files."""
        return self._samples(self.shards.files, record)

    def _samples(self, files: Sequence[str], record: Record, stages: Sequence[Any] = ()) -> Iterator[Any]:
        faults = ShardFaults(self.split, record)
        yield from read_shards(files, faults, stages)
        faults.finish()

    def label(self, row: Any) -> int:
        """Returns the class number of a sample."""
        return self.targets.number(label_of(row, self.source, self.shards.label_field), self.name(row))

    def image(self, row: Any) -> Image.Image:
        """Returns the decoded image of a sample."""
        with Image.open(io.BytesIO(row[image_key(row, self.source)])) as image:
            return to_mode(image, self.source.mode, self.source.images)

    def name(self, row: Any) -> str:
        """Returns the key of a sample and its shard."""
        return f"{row.get('__key__')} in {row.get('__url__')}"


class ShardFaults:
    """Handles webdataset's errors: records what can't be read, and goes on with the next sample.

    Args:
        split: of the data set.
        record: see ``Record``.
    """

    def __init__(self, split: str, record: Record) -> None:
        self.split, self.record = split, record
        self.unnamed: str | None = None

    def __call__(self, error: Exception) -> bool:
        """Records the error, and returns True, so that webdataset goes on; raises a DataError again."""
        if isinstance(error, DataError):
            raise error
        texts = [part for part in error.args if isinstance(part, str)]
        if len(error.args) > 1 and error.args[-1:] == tuple(texts[-1:]):  # webdataset added the shard's address
            reason_text = texts[0] if len(texts) > 1 else ""
            self.record(fault_line(f"the rest of shard {texts[-1]}", self.split, error, reason_text))
            self.unnamed = None
        else:  # within a shard: when that can't be read on, a second error will say which one it is
            self.unnamed = fault_line("a part of a shard", self.split, error)
        return True

    def finish(self) -> None:
        """Records an error that no second one has named."""
        if self.unnamed is not None:
            self.record(self.unnamed)


def read_shards(files: Sequence[str], handler: Any, stages: Sequence[Any] = ()) -> Any:
    """Returns an iterable of the undecoded samples of some shards.

    Args:
        files: the shards.
        handler: of webdataset's errors.
        stages: further stages of webdataset's pipeline.
    """
    import webdataset as wds

    if not files:
        return ()
    return wds.DataPipeline(wds.SimpleShardList(list(files)), wds.tarfile_to_samples(handler=handler), *stages)


def open_shards(source: SplitSource) -> ShardStream:
    """Opens a split of a webdataset and looks at its first sample.

    Raises:
        DataError: a split that is missing, shards that can't be read, samples without an image or a label.
    """
    try:
        import webdataset  # noqa: F401
    except ImportError:
        raise DataError(f"{source.name}: needs the package webdataset: {how_to_install('data')}") from None
    source.check_options(OPTIONS)
    shards = list_shards(source)
    first = first_sample(source, shards.files)
    check_sample(first, source, shards.label_field)
    names = shards.class_names
    targets = Targets(source.name, source.split, names, source.classes or names, source.class_map, source.num_classes)
    stream = ShardStream(source, shards, targets)
    stream.label(first)
    return stream


def first_sample(source: SplitSource, files: Sequence[str]) -> dict[str, Any]:
    """Returns the first sample of the first shard that can be read; raises DataError if there is none."""
    fault: list[str] = []

    def note(error: Exception) -> bool:
        fault.append(reason(error))
        return False  # ends the shard

    for file in files:
        sample = next(iter(read_shards([file], note)), None)
        if sample is not None:
            return dict(sample)
    why = f": {fault[0]}" if fault else ""
    raise DataError(
        f"{source.where}: none of its {len(files)} shards ({files[0]}, ...) has a sample that can be read{why}"
    )
