"""Loaders of a run. Map-style sets use our samplers; streamed sets (webdataset, ...) are split by timm's own readers."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from vit_tucker.config.schema import DataConfig, TrainConfig
from vit_tucker.data.datasets import is_iterable, load_dataset, subset
from vit_tucker.data.sampler import EvalSampler, Key, TrainSampler
from vit_tucker.data.seeding import derive_seed, seeded
from vit_tucker.data.transforms import eval_transform, train_transform
from vit_tucker.errors import ConfigError, DataError

Batch = tuple[Tensor, Tensor]


class SeededDataset(Dataset):
    """A data set with a transform whose randomness depends on (seed, epoch, index) alone.

    Args:
        dataset: map-style, yields (PIL image, int).
        transform: PIL image -> tensor; draws from Python's, NumPy's and torch's global generators.
        seed: of the run.
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], Any], seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        epoch, index = key
        image, label = self.dataset[index]
        with seeded(derive_seed(self.seed, epoch, 1, index)):
            return self.transform(image), label


class StreamShare(IterableDataset):
    """One process's share of a streamed evaluation set: every world_size-th image of each reader worker, each exactly once.

    timm's readers give each process whole shards and then pad or cut to equal lengths, which counts some images twice and
    others never. Here all processes read the same stream and take turns.
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], Any], rank: int, world_size: int) -> None:
        reader = dataset.reader
        for name, value in (("dist_rank", 0), ("dist_num_replicas", 1)):
            if hasattr(reader, name):
                setattr(reader, name, value)
        self.dataset, self.transform, self.rank, self.world_size = dataset, transform, rank, world_size

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for image, label in itertools.islice(self.dataset, self.rank, None, self.world_size):
            yield self.transform(image), label


@dataclass
class TrainLoader:
    """Training batches of one process, grouped into optimizer steps.

    Attributes:
        loader: yields micro-batches.
        sampler: of a map-style set; None if streamed.
        num_samples: images in the training split.
        steps_per_epoch: optimizer steps per epoch.
        accumulation: micro-batches per step.
    """

    loader: DataLoader
    sampler: TrainSampler | None
    num_samples: int
    steps_per_epoch: int
    accumulation: int

    def steps(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """Micro-batches of each optimizer step of an epoch, from ``start_step`` on."""
        if self.sampler is not None:
            self.sampler.set_position(epoch, start_step)
            done = start_step
        else:
            self.loader.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
            done = 0  # a stream starts at its beginning; what is done already is read and dropped
        micro_batches: list[Batch] = []
        for images, labels in self.loader:
            micro_batches.append((images, labels))
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
        eval: yields (images, labels) of this process's share.
        num_eval: images in the evaluation split; None if streamed without a known size.
    """

    train: TrainLoader | None
    eval: DataLoader
    num_eval: int | None


def build_loaders(
    data: DataConfig,
    train: TrainConfig,
    resolved: dict[str, Any],
    seed: int,
    rank: int,
    world_size: int,
    pin_memory: bool,
    with_train: bool = True,
) -> Loaders:
    """Loaders of one process.

    Args:
        data, train: config sections.
        resolved: timm's data config, see ``resolve_data``.
        seed: of the run.
        rank, world_size: this process.
        pin_memory: for copies to a GPU.
        with_train: open the training split too.

    Raises:
        DataError: a split is missing or empty. ConfigError: a batch size that doesn't fit.
    """
    mode = "L" if resolved["input_size"][0] == 1 else "RGB"
    micro_batch = train.global_batch_size // (world_size * train.grad_accum_steps)
    options: dict[str, Any] = {
        "num_workers": data.num_workers,
        "pin_memory": pin_memory,
        "persistent_workers": data.num_workers > 0,
    }
    train_loader = _train_loader(data, train, resolved, seed, rank, world_size, mode, options) if with_train else None
    split = load_dataset(data.dataset, data.val_split, False, mode, data.root, _options(data, micro_batch, seed))
    batch_size = train.eval_batch_size or max(1, micro_batch)
    if is_iterable(split):
        stream = StreamShare(split, eval_transform(resolved), rank, world_size)
        _tell_workers(split, data.num_workers)
        return Loaders(train_loader, DataLoader(stream, batch_size=batch_size, **options), None)
    if len(split) == 0:
        raise DataError(f"data.val_split: split '{data.val_split}' of {data.dataset} is empty")
    dataset = SeededDataset(split, eval_transform(resolved), seed)
    sampler = EvalSampler(len(split), batch_size, rank, world_size)
    return Loaders(train_loader, DataLoader(dataset, batch_sampler=sampler, **options), len(split))


def _train_loader(
    data: DataConfig,
    train: TrainConfig,
    resolved: dict[str, Any],
    seed: int,
    rank: int,
    world_size: int,
    mode: str,
    options: dict[str, Any],
) -> TrainLoader:
    micro_batch = train.global_batch_size // (world_size * train.grad_accum_steps)
    split = load_dataset(data.dataset, data.train_split, True, mode, data.root, _options(data, micro_batch, seed))
    split = subset(split, data.num_samples)
    streamed = is_iterable(split)
    total = split.reader.num_samples if streamed else len(split)
    try:
        sampler = TrainSampler(total, train.global_batch_size, seed, rank, world_size, train.grad_accum_steps)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    steps = sampler.steps_per_epoch
    if streamed:
        split.transform = train_transform(data, resolved)
        _tell_workers(split, data.num_workers)
        generator = torch.Generator().manual_seed(derive_seed(seed, rank))
        loader = DataLoader(split, batch_size=micro_batch, drop_last=True, generator=generator, **options)
        return TrainLoader(loader, None, total, steps, train.grad_accum_steps)
    dataset = SeededDataset(split, train_transform(data, resolved), seed)
    loader = DataLoader(dataset, batch_sampler=sampler, generator=torch.Generator(), **options)
    return TrainLoader(loader, sampler, total, steps, train.grad_accum_steps)


def _options(data: DataConfig, batch_size: int, seed: int) -> dict[str, Any]:
    return {"download": data.download, "batch_size": batch_size, "seed": seed, **data.dataset_kwargs}


def _tell_workers(dataset: Any, num_workers: int) -> None:
    """timm's streaming readers split by loader workers and must know their number."""
    if hasattr(dataset, "set_loader_cfg"):
        dataset.set_loader_cfg(num_workers=num_workers)
