"""The sources from which both image loaders of one process are built."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vit_tucker.config.schema import DataConfig, TrainConfig
from vit_tucker.data.batches import Normalise, SeededDataset, collate
from vit_tucker.data.faults import FaultLog
from vit_tucker.data.memory import KeptSamples
from vit_tucker.data.preparation import Preparation
from vit_tucker.data.streams import StreamReader
from vit_tucker.data.workers import WorkerLoader


@dataclass(frozen=True)
class LoaderSources:
    """The arguments of ``build_loaders`` that both loaders of one process are built from."""

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
        """Returns the number of images of one process and accumulation step."""
        return self.train.global_batch_size // (self.world_size * self.train.grad_accum_steps)

    def stream(self, dataset: Any, split: str, rank: int, world_size: int) -> StreamReader:
        """Returns the reader of ``split`` of a streamed ``dataset``; other arguments as of ``build_loaders``.

        It splits by loader workers and must know their number.
        """
        if hasattr(dataset, "set_loader_cfg"):  # where old timm takes 0 to mean no shard at all
            dataset.set_loader_cfg(num_workers=max(1, self.data.num_workers))
        return StreamReader(dataset, split, self.data.max_bad_images, rank, world_size, self.num_classes)

    def load(self, dataset: Dataset, in_process: bool = False, **options: Any) -> DataLoader:
        """Returns a DataLoader with the shared options.

        Args:
            dataset: torch's.
            in_process: without workers.
            options: of the DataLoader, in place of the shared ones.
        """
        workers = 0 if in_process else self.data.num_workers
        return WorkerLoader(
            dataset,
            num_workers=workers,
            pin_memory=self.pin_memory,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # else it would draw from the global one
            **{"collate_fn": partial(collate, shape=self.resolved["input_size"]), **options},
        )

    def load_samples(self, samples: SeededDataset, sampler: Sampler, preparation: Preparation) -> DataLoader:
        """Returns the DataLoader of samples in an order.

        Args:
            samples: map-style.
            sampler: their order, in batches.
            preparation: how they are read; "kept" ones in this process.
        """
        if preparation.kind == "kept":
            return self.load(KeptSamples(samples), in_process=True, batch_sampler=sampler)
        return self.load(samples, batch_sampler=sampler)
