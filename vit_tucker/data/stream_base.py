"""A streamed data set: which part of it a loader worker reads, and its first samples alone."""

import itertools
import math
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch.utils.data import IterableDataset

from vit_tucker.data.faults import FaultLog, fault_line
from vit_tucker.errors import DataError

Record = Callable[[str], None]
"""Records the fault line of a bad image; raises DataError for too many."""
PREFIX_BUFFER = 4096
"""Samples of a stream's prefix that are shuffled together."""


@dataclass(frozen=True)
class Share:
    """The part of a stream that one loader worker of one process reads.

    Attributes:
        seed: of the shuffle buffer; None reads in the order of the files, and each image once.
        epoch: shards are shuffled by it.
        rank, world_size: the process.
        worker, workers: the loader worker.
    """

    seed: int | None = None
    epoch: int = 0
    rank: int = 0
    world_size: int = 1
    worker: int = 0
    workers: int = 1

    @property
    def number(self) -> int:
        """Returns the number of this worker among those of all processes, from 0."""
        return self.rank * self.workers + self.worker

    @property
    def count(self) -> int:
        """Returns the number of loader workers of all processes."""
        return self.world_size * self.workers

    def wanted(self, images: int, batch_size: int) -> int:
        """Returns how many training images the share gives in an epoch: its part, in whole batches."""
        return math.ceil(math.ceil(images / self.count) / batch_size) * batch_size


class Stream(IterableDataset):
    """A streamed data set of (PIL image, int).

    Args:
        split: its name.
        size: images of the split; None if unknown.
        batch_size: images of one process per step.
        class_names: of the classes, in the order of their numbers; None if unknown.
        notes: lines for the log.
    """

    def __init__(
        self,
        split: str,
        size: int | None,
        batch_size: int,
        class_names: tuple[str, ...] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.split, self.size, self.batch_size = split, size, batch_size
        self.class_names, self.notes = class_names, notes
        self.limit: int | None = None

    @abstractmethod
    def rows(self, share: Share, generator: random.Random, record: Record) -> Iterator[Any]:
        """Yields the undecoded samples of a share, once through its files; shuffled if the share has a seed.

        Args:
            share: what to read.
            generator: of the shuffle buffer, in its state after earlier passes.
            record: called for bad parts of files.
        """

    @abstractmethod
    def ordered(self, record: Record) -> Iterator[Any]:
        """Yields all undecoded samples in the order of the files, in any process and worker."""

    @abstractmethod
    def label(self, row: Any) -> int:
        """Returns the class number of a sample; a DataError ends the stream, other exceptions mean a damaged sample."""

    @abstractmethod
    def image(self, row: Any) -> Image.Image:
        """Returns the image of a sample; any exception is that of a bad image."""

    @abstractmethod
    def name(self, row: Any) -> str:
        """Returns the name of a sample, for messages."""

    def first(self, samples: int) -> "Stream":
        """Returns the stream cut to its first samples in the order of the files; raises DataError for more than there are."""
        if self.size is not None and samples > self.size:
            raise DataError(f"data.num_samples={samples}: the training split has {self.size} images")
        self.size = self.limit = samples
        return self

    def read(self, share: Share, record: Record) -> Iterator[tuple[Image.Image, int]]:
        """Yields the images of one epoch.

        Raises:
            DataError: a label that can't be, no images for this share, fewer samples than ``data.num_samples``.
        """
        generator = random.Random(share.seed)
        if share.seed is None:
            yield from self._decoded(self._rows(share, generator, record), record)
            return
        assert self.size is not None
        sent, wanted = 0, share.wanted(self.size, self.batch_size)
        while sent < wanted:
            before = sent
            for sample in self._decoded(self._rows(share, generator, record), record):
                yield sample
                sent += 1
                if sent == wanted:
                    return
            if sent == before:
                raise DataError(
                    f"the stream of split '{self.split}' has no images for this process or loader worker; lower "
                    "data.num_workers, or make more shards"
                )

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        return self.read(Share(), _refuse)

    def _rows(self, share: Share, generator: random.Random, record: Record) -> Iterator[Any]:
        if self.limit is None:
            return self.rows(share, generator, record)
        rows = self._share_of_prefix(share, record)
        return rows if share.seed is None else shuffled(rows, PREFIX_BUFFER, generator)

    def _share_of_prefix(self, share: Share, record: Record) -> Iterator[Any]:
        """Yields every n-th of the first samples: each worker reads all of them and decodes its own."""
        assert self.limit is not None
        seen, number, count = 0, share.number, share.count
        if number >= self.limit:  # more workers than samples: the workers of a process then read the same
            number, count = share.rank, share.world_size
        for row in itertools.islice(self.ordered(record), self.limit):
            if seen % count == number:
                yield row
            seen += 1
        if seen < self.limit:
            raise DataError(f"data.num_samples={self.limit}: the stream of split '{self.split}' has {seen} samples")

    def _decoded(self, rows: Iterator[Any], record: Record) -> Iterator[tuple[Image.Image, int]]:
        for row in rows:
            label = None
            try:
                label = self.label(row)
                image = self.image(row)
            except Exception as error:  # decoders raise anything
                if isinstance(error, MemoryError) or (label is None and isinstance(error, DataError)):
                    raise
                record(fault_line(self.name(row), self.split, error))
                continue
            yield image, label


def _refuse(line: str) -> None:
    FaultLog(0).add([line])


def shuffled(rows: Iterator[Any], size: int, generator: random.Random) -> Iterator[Any]:
    """Yields rows through a buffer from which each next one is drawn.

    Args:
        rows: of any kind.
        size: of the buffer, in rows.
        generator: that draws.
    """
    held: list[Any] = []
    for row in rows:
        if len(held) < size:
            held.append(row)
            continue
        place = generator.randrange(size)
        held[place], row = row, held[place]
        yield row
    generator.shuffle(held)
    yield from held


def stream_size(dataset: Any, split: str) -> int:
    """Returns the number of training images of a streamed data set; raises DataError if it is unknown."""
    size = dataset.size if isinstance(dataset, Stream) else dataset.reader.num_samples
    if not size:
        raise DataError(
            f"the stream of split '{split}' does not state its number of images, which determines the steps of an epoch; set "
            "data.dataset_kwargs={num_samples: ...}"
        )
    return int(size)
