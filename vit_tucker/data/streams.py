"""Streamed data sets (webdataset, Hugging Face's streams, TFDS), read by timm.data's readers.

A stream has no index: a bad image is dropped and named, and in training the reader goes on until it has enough images. What
an epoch yields follows from (seed, epoch, rank, worker), so that it can be read again from its beginning after a resume.
"""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from vit_tucker.data.batches import Sample
from vit_tucker.data.faults import FaultLog, fault_line
from vit_tucker.data.seeding import derive_seed, seed_transforms
from vit_tucker.errors import DataError


class StreamReader:
    """A timm reader whose bad images are named; opened in the process that reads.

    Args:
        dataset: timm.data.IterableImageDataset.
        split: its name.
        limit: bad images that this process may meet; one more is an error.
        rank, world_size: the share that the reader takes.
    """

    def __init__(self, dataset: Any, split: str, limit: int, rank: int, world_size: int) -> None:
        self.dataset, self.split, self.log = dataset, split, FaultLog(limit)
        self.pending: list[str] = []
        self.unnamed: str | None = None  # an error of webdataset that may still be named
        for name, value in (("dist_rank", rank), ("dist_num_replicas", world_size)):
            if hasattr(dataset.reader, name):
                setattr(dataset.reader, name, value)

    def read(self, seed: int | None = None) -> Iterator[tuple[Image.Image, int]]:
        """The images of one epoch.

        Args:
            seed: of the reader's shuffle buffer; None for a reader that does not shuffle.

        Raises:
            DataError: too many bad images, or a stream that can't be read on.
        """
        try:
            self._open(seed)
            yield from self.dataset
            if self.unnamed is not None:
                self._record(self.unnamed)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"the stream can't be read on: {fault_line('data', self.split, error)}") from error

    def taken_faults(self) -> tuple[str, ...]:
        """Lines of the bad images since the last call."""
        lines = tuple(self.pending)
        self.pending.clear()
        return lines

    def _record(self, line: str) -> None:
        self.pending += self.log.add([line])

    def _open(self, seed: int | None) -> None:
        """Build the reader's pipeline, anew where its shuffle buffer would go on drawing from the last epoch's generator."""
        reader = self.dataset.reader
        if not hasattr(reader, "ds") or not hasattr(reader, "_lazy_init"):
            return
        if seed is not None and hasattr(reader, "worker_seed"):
            if reader.ds is None:
                reader._lazy_init()  # the first time it takes over what torch says of this worker, its seed too
            reader.worker_seed, reader.ds = seed, None
        if reader.ds is not None:
            return
        module = sys.modules[type(reader).__module__]
        if hasattr(module, "_decode") and hasattr(module, "log_and_continue"):  # webdataset: bad samples come to us
            decode = NamedDecode(module._decode, self.split)
            with swapped(module, _decode=decode, log_and_continue=self._on_webdataset_error):
                reader._lazy_init()
        else:
            reader._lazy_init()
        if hasattr(reader.ds, "cast_column"):  # Hugging Face: a bad image would end the stream
            reader.ds = DecodedStream(reader.ds, reader.input_key, self.split, self._record, training=seed is not None)

    def _on_webdataset_error(self, error: Exception) -> bool:
        """webdataset's handler: True goes on with the next sample."""
        if isinstance(error, BadSample):
            self._record(str(error))
            return True
        if (
            isinstance(error, TypeError) or type(error).__name__ == "WdsTargetKeyError"
        ):  # a wrong config, as timm sees it
            raise error
        texts = [part for part in error.args if isinstance(part, str)]
        if len(error.args) > 1 and error.args[-1:] == tuple(texts[-1:]):  # webdataset added the shard's address
            reason = texts[0] if len(texts) > 1 else ""
            self._record(fault_line(f"the rest of shard {texts[-1]}", self.split, error, reason))
            self.unnamed = None
        else:  # within a shard: when that can't be read on, a second error will say which one it is
            self.unnamed = fault_line("a part of a shard", self.split, error)
        return True


@contextlib.contextmanager
def swapped(module: Any, **attributes: Any) -> Iterator[None]:
    """A module with other attributes inside: timm's readers look them up when they build their pipelines."""
    before = {name: getattr(module, name) for name in attributes}
    vars(module).update(attributes)
    try:
        yield
    finally:
        vars(module).update(before)


class BadSample(Exception):
    """A sample of a stream that can't be decoded; the message is its fault line."""


class NamedDecode:
    """timm's decoder of webdataset samples, whose errors name the sample.

    Args:
        decode: timm's.
        split: for the message.
    """

    def __init__(self, decode: Callable[..., Any], split: str) -> None:
        self.decode, self.split = decode, split

    def __call__(self, sample: dict[str, Any], **options: Any) -> Any:
        try:
            return self.decode(sample, **options)
        except Exception as error:
            if isinstance(error, TypeError) or type(error).__name__ == "WdsTargetKeyError":
                raise
            name = f"{sample.get('__key__')} in {sample.get('__url__')}"
            raise BadSample(fault_line(name, self.split, error)) from None


class DecodedStream:
    """A Hugging Face stream whose images are decoded here, so that a bad one is dropped and named.

    Args:
        stream: datasets.IterableDataset.
        key: column of the images.
        split: for the message.
        record: takes a fault line.
        training: timm then begins a stream anew until it has enough images; one without any would go on for ever.
    """

    def __init__(self, stream: Any, key: str, split: str, record: Callable[[str], None], training: bool) -> None:
        from datasets import Image as ImageFeature

        self.stream = stream.cast_column(key, ImageFeature(decode=False))
        self.feature, self.key, self.split, self.record = ImageFeature(), key, split, record
        self.training = training

    def __getattr__(self, name: str) -> Any:  # set_epoch, num_shards, ...
        return getattr(self.__dict__["stream"], name)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        found = 0
        for number, sample in enumerate(self.stream):
            stored = sample[self.key]
            try:
                image = self.feature.decode_example(stored)
            except Exception as error:
                path = stored.get("path") if isinstance(stored, dict) else None
                self.record(fault_line(path or f"image {number} of the stream", self.split, error))
                continue
            found += 1
            yield {**sample, self.key: image}
        if self.training and not found:
            raise DataError(
                f"the stream of split '{self.split}' has no images for this process or loader worker; lower data.num_workers, or "
                "make more shards"
            )


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
        """Epoch that the next iteration reads."""
        self.epoch.fill_(epoch)
        self.reader.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Sample]:
        info, epoch = get_worker_info(), int(self.epoch)
        worker = info.id if info is not None else 0
        images = self.reader.read(derive_seed(self.seed, epoch, 4, self.rank, worker))
        for number, (image, label) in enumerate(images):
            seed_transforms(derive_seed(self.seed, epoch, 5, self.rank, worker, number))
            yield Sample(self.transform(image), int(label), self.reader.taken_faults())


class EvalStream(IterableDataset):
    """One process's share of a streamed evaluation set: every world_size-th image of each reader worker, each exactly once.

    timm's readers give each process whole shards and then pad or cut to equal lengths, which counts some images twice and
    others never. Here all processes read the same stream and take turns.

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
