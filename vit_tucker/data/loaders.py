"""Loaders of a run. Map-style sets use our samplers; streamed sets (webdataset, ...) are split by shards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vit_tucker.config.schema import DataConfig, TrainConfig
from vit_tucker.data.batches import Batch, Collate, Normalise, SeededDataset, checked_batches
from vit_tucker.data.datasets import is_iterable
from vit_tucker.data.faults import FaultLog
from vit_tucker.data.memory import AugmentedBatches, KeptBatches, hold_images
from vit_tucker.data.preparation import Preparation, choose_preparation, describe_preparation
from vit_tucker.data.sampler import EvalSampler, TrainSampler
from vit_tucker.data.splits import open_splits
from vit_tucker.data.stream_base import stream_size
from vit_tucker.data.streams import EvalStream, StreamReader, TrainStream
from vit_tucker.data.transforms import eval_transform, train_transform
from vit_tucker.data.workers import end_workers, init_worker
from vit_tucker.errors import ConfigError, DataError


@dataclass
class TrainLoader:
    """Training batches of one process, grouped into optimizer steps.

    Attributes:
        loader: yields micro-batches.
        sampler: of a map-style set; None if streamed.
        num_samples: images in the training split.
        steps_per_epoch: optimizer steps per epoch.
        accumulation: micro-batches per step.
        faults: bad images of this process so far.
        normalise: on the model's device.
        description: which way the images take, and why; for the log.
    """

    loader: DataLoader
    sampler: TrainSampler | None
    num_samples: int
    steps_per_epoch: int
    accumulation: int
    faults: FaultLog
    normalise: Normalise
    description: str

    def steps(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """Micro-batches of each optimizer step of an epoch, from ``start_step`` on.

        Raises:
            DataError: more bad images than ``data.max_bad_images``.
        """
        if self.sampler is not None:
            self.sampler.set_position(epoch, start_step)
            done = start_step
        else:
            self.loader.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
            done = 0  # a stream starts at its beginning; what is done already is read and dropped
        micro_batches: list[Batch] = []
        for batch in checked_batches(self.loader, self.faults, self.normalise):
            micro_batches.append(batch)
            if len(micro_batches) == self.accumulation:
                if done >= start_step:
                    yield micro_batches
                micro_batches = []
                done += 1
                if done == self.steps_per_epoch:
                    return


@dataclass
class EvalLoader:
    """Evaluation batches of one process's share; bad images are left out, so that a batch may be empty.

    Attributes:
        loader: yields batches.
        faults: bad images of this process so far.
        normalise: on the model's device.
        description: which way the images take, and why; for the log.
    """

    loader: DataLoader
    faults: FaultLog
    normalise: Normalise
    description: str

    def __iter__(self) -> Iterator[Batch]:
        return checked_batches(self.loader, self.faults, self.normalise)


@dataclass
class Loaders:
    """Both loaders of a run, and the data set's size.

    Attributes:
        train: None when only evaluating.
        eval: this process's share.
        num_eval: images in the evaluation split, bad ones included; None if streamed without a known size.
        faults: bad images of this process so far, of both splits; more than ``data.max_bad_images`` end the iteration.
        label_names: of the classes, by the class map of the training split; None if the data set doesn't tell.
        notes: lines for the log about both splits, see ``split_notes``.
    """

    train: TrainLoader | None
    eval: EvalLoader
    num_eval: int | None
    faults: FaultLog
    label_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line for the log: which way the images of each split take, and why."""
        training = f"training: {self.train.description}; " if self.train is not None else ""
        return f"{training}evaluation: {self.eval.description}"

    def note_bad_images(self, lines: Sequence[str]) -> None:
        """Add bad images that are known before the first step, as fault lines; no more than ``data.max_bad_images``."""
        self.faults.add(lines)
        self.notes += tuple(f"bad image: {line}" for line in lines)

    def close(self) -> None:
        """End all worker processes now; after an error they would else take 5 s more, see ``end_workers``."""
        for part in (self.train, self.eval):
            if part is not None:
                end_workers(part.loader)


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
    """Loaders of one process.

    Args:
        data, train: config sections.
        resolved: timm's data config, see ``resolve_data``.
        seed: of the run.
        rank, world_size: this process.
        pin_memory: for copies to a GPU.
        with_train: open the training split too.
        device: of the model, where the batches go.
        classes: stored class map: names in the order of their numbers; the training split's if None.
        num_classes: of the model: labels beyond it are refused; None if they may be any.

    Raises:
        DataError: a split is missing or empty. ConfigError: a batch size that doesn't fit, ``data.in_memory`` or
            ``data.aug_repeats`` where they can't be.
    """
    normalise = Normalise(resolved["mean"], resolved["std"], device)
    faults = FaultLog(data.max_bad_images)
    place = LoaderSources(data, train, resolved, seed, rank, world_size, pin_memory, faults, normalise, num_classes)
    splits = open_splits(
        data,
        resolved["input_size"][0],
        with_train=with_train,
        classes=classes,
        num_classes=num_classes,
        batch_size=place.micro_batch,
        seed=seed,
    )
    train_loader = _train_loader(place, splits.train) if with_train else None
    eval_loader, num_eval = _eval_loader(place, splits.eval)
    return Loaders(train_loader, eval_loader, num_eval, place.faults, splits.classes, splits.notes)


@dataclass(frozen=True)
class LoaderSources:
    """What both loaders of one process are built from, see ``build_loaders``."""

    data: DataConfig
    train: TrainConfig
    resolved: dict[str, Any]
    seed: int
    rank: int
    world_size: int
    pin_memory: bool
    faults: FaultLog
    normalise: Normalise
    num_classes: int | None = None

    @property
    def micro_batch(self) -> int:
        """Images of one process and accumulation step."""
        return self.train.global_batch_size // (self.world_size * self.train.grad_accum_steps)

    def stream(self, dataset: Any, split: str, rank: int, world_size: int) -> StreamReader:
        """The reader of a streamed set; it splits by loader workers and must know their number."""
        if hasattr(dataset, "set_loader_cfg"):
            dataset.set_loader_cfg(
                num_workers=max(1, self.data.num_workers)
            )  # old timm takes 0 to mean no shard at all
        return StreamReader(dataset, split, self.data.max_bad_images, rank, world_size, self.num_classes)

    def load(self, dataset: Dataset, in_process: bool = False, **options: Any) -> DataLoader:
        """DataLoader with the options that all loaders share; ``in_process`` goes without workers."""
        workers = 0 if in_process else self.data.num_workers
        return DataLoader(
            dataset,
            num_workers=workers,
            pin_memory=self.pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=init_worker,
            generator=torch.Generator(),  # else it would draw from the global one
            **{"collate_fn": Collate(self.resolved["input_size"]), **options},
        )

    def load_batches(self, dataset: Dataset, sampler: Any, in_process: bool = False) -> DataLoader:
        """DataLoader of a data set whose items are batches already."""
        return self.load(dataset, in_process, batch_size=None, sampler=sampler, collate_fn=as_it_is)


def as_it_is(batch: Batch) -> Batch:
    """Collates what is a batch already; a function of the module, so that it can go to worker processes."""
    return batch


def _train_loader(place: LoaderSources, split: Any) -> TrainLoader:
    data, train = place.data, place.train
    streamed = is_iterable(split)
    total = stream_size(split, data.train_split) if streamed else len(split)
    repeats = max(1, data.aug_repeats)
    if streamed and repeats > 1:
        raise ConfigError(f"data.aug_repeats={repeats}: a streamed data set can't repeat its images; choose 0")
    shares = place.rank, place.world_size, train.grad_accum_steps
    try:
        sampler = TrainSampler(total, train.global_batch_size, place.seed, *shares, repeats)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    way = choose_preparation(data, split, place.resolved["input_size"], training=True)
    name, limit = data.train_split, data.max_bad_images
    if streamed:
        reader = place.stream(split, name, place.rank, place.world_size)
        stream = TrainStream(
            reader, train_transform(data, place.resolved, normalize=bool(data.reprob)), place.seed, place.rank
        )
        loader = place.load(stream, batch_size=place.micro_batch, drop_last=True)
    elif way.kind == "augmented":
        held = hold_images(split, name, place.faults)
        loader = place.load_batches(AugmentedBatches(held, data, place.resolved, place.seed), sampler)
    elif way.kind == "kept":
        fixed = train_transform(data, place.resolved, normalize=False)
        kept = KeptBatches(split, fixed, place.resolved, name, True, limit)
        loader = place.load_batches(kept, sampler, in_process=True)
    else:
        dataset = SeededDataset(
            split, train_transform(data, place.resolved, normalize=bool(data.reprob)), place.seed, name, True, limit
        )
        loader = place.load(dataset, batch_sampler=sampler)
    return TrainLoader(
        loader,
        None if streamed else sampler,
        total,
        sampler.steps_per_epoch,
        train.grad_accum_steps,
        place.faults,
        place.normalise,
        describe_preparation(way, total, loader.num_workers),
    )


def _eval_loader(place: LoaderSources, split: Any) -> tuple[EvalLoader, int | None]:
    data = place.data
    batch_size = place.train.eval_batch_size or max(1, place.micro_batch)
    if is_iterable(split):
        reader = place.stream(split, data.val_split, 0, 1)
        stream = EvalStream(reader, eval_transform(place.resolved, normalize=False), place.rank, place.world_size)
        loader = place.load(stream, batch_size=batch_size)
        description = describe_preparation(Preparation("image", "a stream"), None, loader.num_workers)
        return EvalLoader(loader, place.faults, place.normalise, description), None
    if len(split) == 0:
        raise DataError(f"data.val_split: split '{data.val_split}' of {data.dataset} is empty")
    sampler = EvalSampler(len(split), batch_size, place.rank, place.world_size)
    way = choose_preparation(data, split, place.resolved["input_size"], training=False)
    if way.kind == "kept":
        fixed = eval_transform(place.resolved, normalize=False)
        loader = place.load_batches(KeptBatches(split, fixed, place.resolved, data.val_split, False), sampler, True)
    else:
        dataset = SeededDataset(
            split, eval_transform(place.resolved, normalize=False), place.seed, data.val_split, False
        )
        loader = place.load(dataset, batch_sampler=sampler)
    description = describe_preparation(way, len(split), loader.num_workers)
    return EvalLoader(loader, place.faults, place.normalise, description), len(split)
