"""Streamed data sets (webdataset, Hugging Face's streams, TFDS): what a process and loader worker reads of them.

A stream has no index: a bad image is dropped and named, and in training the reader goes on until it has enough images. What
an epoch yields follows from (seed, epoch, rank, worker), so that it can be read again from its beginning after a resume.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from vit_tucker.data.batches import Sample
from vit_tucker.data.classes import refuse_label
from vit_tucker.data.faults import FaultLog, fault_line
from vit_tucker.data.seeding import derive_seed, seed_transforms
from vit_tucker.data.stream_base import Share, Stream
from vit_tucker.errors import DataError


class StreamReader:
    """A stream whose bad images are named; opened in the process that reads.

    Args:
        dataset: a ``Stream``, or timm.data.IterableImageDataset of TFDS.
        split: its name.
        limit: bad images that this process may meet; one more is an error.
        rank, world_size: the share that the process takes.
        num_classes: of the model, for the labels of TFDS; a ``Stream`` has its own. None if it may be any.
    """

    def __init__(
        self, dataset: Any, split: str, limit: int, rank: int = 0, world_size: int = 1, num_classes: int | None = None
    ) -> None:
        self.dataset, self.split, self.log = dataset, split, FaultLog(limit)
        self.rank, self.world_size, self.num_classes = rank, world_size, num_classes
        self.pending: list[str] = []
        if not isinstance(dataset, Stream):
            for name, value in (("dist_rank", rank), ("dist_num_replicas", world_size)):
                if hasattr(dataset.reader, name):
                    setattr(dataset.reader, name, value)

    def read(self, seed: int | None = None, epoch: int = 0) -> Iterator[tuple[Image.Image, int]]:
        """Yields the images of one epoch.

        Args:
            seed: of the shuffle buffer; None for a stream that does not shuffle.
            epoch: whose order of shards is read.

        Raises:
            DataError: too many bad images, or a stream that can't be read on.
        """
        info = get_worker_info()
        place = {} if info is None else {"worker": info.id, "workers": info.num_workers}
        try:
            if isinstance(self.dataset, Stream):
                share = Share(seed, epoch, self.rank, self.world_size, **place)
                yield from self.dataset.read(share, self._record)
            else:
                reopen(self.dataset.reader, seed)
                for number, (image, label) in enumerate(self.dataset):
                    if label < 0 or (self.num_classes is not None and label >= self.num_classes):
                        refuse_label(int(label), self.num_classes, self.split, f"image {number} of the stream")
                    yield image, label
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"the stream can't be read on: {fault_line('data', self.split, error)}") from error

    def taken_faults(self) -> tuple[str, ...]:
        """Returns the lines of the bad images since the last call."""
        lines = tuple(self.pending)
        self.pending.clear()
        return lines

    def _record(self, line: str) -> None:
        self.pending += self.log.add([line])


def reopen(reader: Any, seed: int | None) -> None:
    """Builds the pipeline of timm's reader, anew where its shuffle buffer would go on drawing from the last epoch's generator."""
    if not hasattr(reader, "ds") or not hasattr(reader, "_lazy_init"):
        return
    if seed is not None and hasattr(reader, "worker_seed"):
        if reader.ds is None:
            reader._lazy_init()  # the first time it adopts torch's settings of this worker, its seed too
        reader.worker_seed, reader.ds = seed, None
    if reader.ds is None:
        reader._lazy_init()


class TrainStream(IterableDataset):
    """One process's training stream; the same images, order and augmentation whenever an epoch is read.

    Args:
        reader: of this process's share.
        transform: PIL image -> tensor; draws from the global generators.
        seed: of the run.
        rank: this process.
    """

    def __init__(self, reader: StreamReader, transform: Callable[[Any], Any], seed: int, rank: int) -> None:
        self.reader, self.transform, self.seed, self.rank = reader, transform, seed, rank
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # persistent workers see it change

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the next iteration reads."""
        self.epoch.fill_(epoch)
        if hasattr(self.reader.dataset, "set_epoch"):
            self.reader.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Sample]:
        info, epoch = get_worker_info(), int(self.epoch)
        worker = info.id if info is not None else 0
        images = self.reader.read(derive_seed(self.seed, epoch, 4, self.rank, worker), epoch)
        for number, (image, label) in enumerate(images):
            seed_transforms(derive_seed(self.seed, epoch, 5, self.rank, worker, number))
            yield Sample(self.transform(image), int(label), self.reader.taken_faults())


class EvalStream(IterableDataset):
    """One process's share of a streamed evaluation set: every world_size-th image of each reader worker, each exactly once.

    Shares of whole shards would have to be padded or cut to equal lengths, which counts some images twice and others never.
    Here all processes read the same stream and take turns.

    Args:
        reader: of the whole set.
        transform: PIL image -> tensor.
        rank, world_size: this process.
    """

    def __init__(self, reader: StreamReader, transform: Callable[[Any], Any], rank: int, world_size: int) -> None:
        self.reader, self.transform, self.rank, self.world_size = reader, transform, rank, world_size

    def __iter__(self) -> Iterator[Sample]:
        for image, label in itertools.islice(self.reader.read(), self.rank, None, self.world_size):
            yield Sample(self.transform(image), int(label), self.reader.taken_faults())
        if faults := self.reader.taken_faults():
            yield Sample(None, -1, faults)
