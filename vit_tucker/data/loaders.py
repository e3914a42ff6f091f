"""Loaders of a run. Map-style sets use our samplers; streamed sets (webdataset, ...) are split by shards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from vit_tucker.config.schema import DataConfig, TrainConfig
from vit_tucker.data.batches import Batch, Batches, Normalise, SeededDataset, StepBatches, checked_batches
from vit_tucker.data.datasets import is_iterable
from vit_tucker.data.faults import FaultLog
from vit_tucker.data.loader_sources import LoaderSources
from vit_tucker.data.memory import HeldImages
from vit_tucker.data.preparation import Preparation, choose_preparation, describe_preparation
from vit_tucker.data.sampler import EvalSampler, TrainSampler
from vit_tucker.data.splits import open_splits
from vit_tucker.data.stream_base import stream_size
from vit_tucker.data.streams import EvalStream, TrainStream
from vit_tucker.data.transforms import eval_transform, train_transform
from vit_tucker.data.workers import end_workers
from vit_tucker.errors import ConfigError, DataError


@dataclass
class BatchLoader:
    """Batches of images of one process. At evaluation bad images are left out, so that a batch may be empty.

    Attributes:
        loader: yields batches.
        faults: bad images of this process so far.
        normalise: on the model's device.
        description: how the images are read, and why; for the log.
    """

    loader: DataLoader
    faults: FaultLog
    normalise: Normalise
    description: str

    def __iter__(self) -> Iterator[Batch]:
        return checked_batches(self.loader, self.faults, self.normalise)

    def __len__(self) -> int:
        return len(self.loader)

    def close(self) -> None:
        """Ends all worker processes now; after an error they would else take 5 s more, see ``end_workers``."""
        end_workers(self.loader)


@dataclass
class TrainLoader(BatchLoader):
    """Training batches of one process, grouped into optimizer steps.

    Attributes:
        sampler: of a map-style set; None if streamed.
        num_samples: images in the training split.
        steps_per_epoch: optimizer steps per epoch.
        accumulation: batches per step.
    """

    sampler: TrainSampler | None
    num_samples: int
    steps_per_epoch: int
    accumulation: int

    def steps(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """Yields each optimizer step's micro-batches, from ``start_step`` on; raises DataError for too many bad images."""
        done = start_step
        if self.sampler is not None:
            self.sampler.set_position(epoch, start_step)
        else:  # a stream starts at its beginning; what is done already is read and dropped
            self.loader.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
            done = 0
        micro_batches: list[Batch] = []
        for batch in self:
            micro_batches.append(batch)
            if len(micro_batches) == self.accumulation:
                if done >= start_step:
                    yield micro_batches
                micro_batches = []
                done += 1
                if done == self.steps_per_epoch:
                    return


@dataclass
class Loaders:
    """Both loaders of a run, and the data set's size.

    Attributes:
        train: None when only evaluating.
        eval: this process's share.
        num_eval: images in the evaluation split, bad ones included, or tokens to predict; None if streamed without a known size.
        faults: bad images of this process so far, of both splits; more than ``data.max_bad_images`` end the iteration.
        label_names: of the classes, by the class map of the training split; None if the data set has none.
        notes: lines for the log about both splits, see ``split_notes``.
    """

    train: StepBatches | None
    eval: Batches
    num_eval: int | None
    faults: FaultLog
    label_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Returns one line for the log: how the images of each split are read, and why."""
        training = f"training: {self.train.description}; " if self.train is not None else ""
        return f"{training}evaluation: {self.eval.description}"

    def note_bad_images(self, lines: Sequence[str]) -> None:
        """Adds bad images that are known before the first step, as fault lines; no more than ``data.max_bad_images``."""
        self.faults.add(lines)
        self.notes += tuple(f"bad image: {line}" for line in lines)

    def close(self) -> None:
        """Ends all worker processes now."""
        for part in (self.train, self.eval):
            if part is not None:
                part.close()


def build_loaders(
    data: DataConfig,
    train: TrainConfig,
    resolved: dict[str, Any],
    seed: int,
    rank: int,
    world_size: int,
    pin_memory: bool,
    with_train: bool = True,
    device: torch.device | str = "cpu",
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
) -> Loaders:
    """Opens the splits of a run and builds the loaders of one process.

    Args:
        data, train: config sections.
        resolved: timm's data config, see ``resolve_data``.
        seed: of the run.
        rank, world_size: this process.
        pin_memory: for copies to a GPU.
        with_train: open the training split too.
        device: of the model, where the batches go.
        classes, num_classes: see ``open_splits``.

    Raises:
        DataError: a split is missing or empty. ConfigError: an impossible batch size, ``data.in_memory`` or ``data.aug_repeats``.
    """
    normalise = Normalise(resolved["mean"], resolved["std"], device)
    faults = FaultLog(data.max_bad_images)
    sources = LoaderSources(data, train, resolved, seed, rank, world_size, pin_memory, faults, normalise, num_classes)
    options: dict[str, Any] = {"num_classes": num_classes, "batch_size": sources.micro_batch, "seed": seed}
    splits = open_splits(data, resolved["input_size"][0], with_train=with_train, classes=classes, **options)
    train_loader = _train_loader(sources, splits.train) if with_train else None
    eval_loader, num_eval = _eval_loader(sources, splits.eval)
    return Loaders(train_loader, eval_loader, num_eval, faults, splits.classes, splits.notes)


def _train_loader(sources: LoaderSources, split: Any) -> TrainLoader:
    data, train = sources.data, sources.train
    streamed = is_iterable(split)
    total = stream_size(split, data.train_split) if streamed else len(split)
    repeats = max(1, data.aug_repeats)
    if streamed and repeats > 1:
        raise ConfigError(f"data.aug_repeats={repeats}: a streamed data set can't repeat its images; choose 0")
    shares = sources.rank, sources.world_size, train.grad_accum_steps
    sampler = TrainSampler(total, train.global_batch_size, sources.seed, *shares, repeats)
    preparation = choose_preparation(data, split, sources.resolved["input_size"], training=True)
    transform = train_transform(data, sources.resolved, normalize=bool(data.reprob) and preparation.kind != "kept")
    if streamed:
        reader = sources.stream(split, data.train_split, sources.rank, sources.world_size)
        stream = TrainStream(reader, transform, sources.seed, sources.rank)
        loader = sources.load(stream, batch_size=sources.micro_batch, drop_last=True)
    else:
        limit = data.max_bad_images
        if preparation.kind == "held":
            split = HeldImages(split, data.train_split, sources.faults)
        samples = SeededDataset(split, transform, sources.seed, data.train_split, replace=True, limit=limit)
        loader = sources.load_samples(samples, sampler, preparation)
    description = describe_preparation(preparation, total, loader.num_workers)
    shared = loader, sources.faults, sources.normalise, description
    return TrainLoader(*shared, None if streamed else sampler, total, sampler.steps_per_epoch, train.grad_accum_steps)


def _eval_loader(sources: LoaderSources, split: Any) -> tuple[BatchLoader, int | None]:
    data = sources.data
    batch_size = sources.train.eval_batch_size or max(1, sources.micro_batch)
    transform = eval_transform(sources.resolved, normalize=False)
    if is_iterable(split):
        reader = sources.stream(split, data.val_split, 0, 1)
        stream = EvalStream(reader, transform, sources.rank, sources.world_size)
        loader = sources.load(stream, batch_size=batch_size)
        count, preparation = None, Preparation("image", "a stream")
    else:
        count = len(split)
        if count == 0:
            raise DataError(f"data.val_split: split '{data.val_split}' of {data.dataset} is empty")
        sampler = EvalSampler(count, batch_size, sources.rank, sources.world_size)
        preparation = choose_preparation(data, split, sources.resolved["input_size"], training=False)
        samples = SeededDataset(split, transform, sources.seed, data.val_split, replace=False)
        loader = sources.load_samples(samples, sampler, preparation)
    description = describe_preparation(preparation, count, loader.num_workers)
    return BatchLoader(loader, sources.faults, sources.normalise, description), count
