"""Assigns images to processes and steps.

An epoch is one permutation of the data set, cut into global batches (with repeated augmentation: of fewer images, each several
times); a global batch is cut into one shard for each process and accumulation step. The union over processes is the same for
any number of them.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from vit_tucker.data.seeding import derive_seed
from vit_tucker.errors import ConfigError

Key = tuple[int, int, int]  # epoch, index, number of the repeat


def shard(batch: torch.Tensor, number: int, shards: int) -> torch.Tensor:
    """Returns part ``number`` of a global batch: a slice from the front and its mirror image from the back.

    timm's mixup pairs image i with image n-1-i of what it gets; mirrored shards keep the pairs of the global batch.

    Args:
        batch: (n, ...) indices, n divisible by ``shards``, of which (n / shards, ...) are returned.
        number: 0 <= number < shards.
        shards: number of parts.
    """
    size = len(batch) // shards
    if size % 2:
        return batch[number * size : (number + 1) * size]
    half = size // 2
    front = batch[number * half : (number + 1) * half]
    back = batch[len(batch) - (number + 1) * half : len(batch) - number * half]
    return torch.cat([front, back])


def refuse_uneven(global_batch_size: int, world_size: int, accumulation: int) -> None:
    """Raises ConfigError if a global batch can't be split evenly, with the nearest sizes and numbers of processes that go.

    Args:
        global_batch_size, world_size, accumulation: as of ``TrainSampler``; ``world_size`` is the number of processes.
    """
    shards = world_size * accumulation
    if global_batch_size % shards == 0:
        return
    below = global_batch_size // shards * shards
    sizes = [f"train.global_batch_size={size}" for size in (below, below + shards) if size]
    counts = [n for n in range(1, 2 * world_size + 1) if global_batch_size % (n * accumulation) == 0]
    near = [n for n in counts if n < world_size][-1:] + [n for n in counts if n > world_size][:1]
    processes = f", or {' or '.join(map(str, near))} process{'es' * (near != [1])}" if near else ""
    raise ConfigError(
        f"train.global_batch_size={global_batch_size} can't be split evenly over {world_size} processes x "
        f"{accumulation} accumulation steps: choose {' or '.join(sizes)}{processes}"
    )


class TrainSampler(Sampler[list[Key]]):
    """Batch sampler of one process: its shards of each global batch, the incomplete last batch dropped.

    Args:
        num_samples: size of the data set.
        global_batch_size: images per optimizer step over all processes and accumulation steps.
        seed: of the run.
        rank, world_size: this process.
        accumulation: micro-batches per step; the sampler yields that many lists per step.
        repeats: how often each drawn image comes in its global batch. An epoch stays as long as without and so draws fewer
            images, as in timm's and DeiT's samplers (repeated augmentation, Hoffer et al. 2020).

    Raises:
        ConfigError: a global batch that is larger than the data set or can't be split evenly.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        accumulation: int,
        repeats: int = 1,
    ) -> None:
        refuse_uneven(global_batch_size, world_size, accumulation)
        if global_batch_size > num_samples:
            raise ConfigError(
                f"train.global_batch_size={global_batch_size} is larger than the {num_samples} training images"
            )
        if global_batch_size % repeats:
            raise ConfigError(
                f"data.aug_repeats={repeats}: train.global_batch_size={global_batch_size} must be a multiple of it, so that "
                "all repeats of an image are in one batch"
            )
        self.repeats = repeats
        self.num_samples, self.global_batch_size, self.seed = num_samples, global_batch_size, seed
        self.rank, self.world_size, self.accumulation = rank, world_size, accumulation
        self.epoch = self.start_step = 0

    @property
    def steps_per_epoch(self) -> int:
        """Returns the number of optimizer steps per epoch."""
        return self.num_samples // self.global_batch_size

    def set_position(self, epoch: int, start_step: int = 0) -> None:
        """Sets the epoch to draw, and the first step of it that is still to do."""
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self.epoch
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, 0))
        order = torch.randperm(self.num_samples, generator=generator)
        drawn = self.global_batch_size // self.repeats
        repeat = torch.arange(self.repeats).repeat_interleave(drawn)
        for step in range(self.start_step, self.steps_per_epoch):
            # a b c a b c, not a a b b c c: mixup's pairs, from the front and the back, are then of different images
            images = order[step * drawn : (step + 1) * drawn].repeat(self.repeats)
            batch = torch.stack([images, repeat], dim=1)  # (n, 2)
            for micro in range(self.accumulation):
                part = shard(batch, micro * self.world_size + self.rank, self.world_size * self.accumulation)
                yield [(epoch, index, number) for index, number in part.tolist()]


class EvalSampler(Sampler[list[Key]]):
    """Batch sampler of one process for evaluation: every world_size-th image, each exactly once over all processes."""

    def __init__(self, num_samples: int, batch_size: int, rank: int, world_size: int) -> None:
        self.indices = list(range(rank, num_samples, world_size))
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index, 0) for index in self.indices[start : start + self.batch_size]]
