"""Windows of tokens as batches: in training drawn from (seed, pass, window), at evaluation in order, each token counted once.

A pass cuts the text into windows that follow each other, from a random token on, and shuffles them. Global batches go on from
pass to pass, so that an epoch may be any number of steps; a step's windows follow from its number alone, for any number of
processes, and after a stop.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vit_tucker.config.schema import DataConfig, TrainConfig
from vit_tucker.data.batches import Batch
from vit_tucker.data.faults import FaultLog
from vit_tucker.data.loaders import Loaders
from vit_tucker.data.sampler import refuse_uneven, shard
from vit_tucker.data.seeding import derive_seed
from vit_tucker.data.token_files import TokenFile, open_tokens
from vit_tucker.errors import ConfigError, DataError

IGNORED = -100
"""Target of a place that does not count, as in torch and transformers."""


def read_windows(tokens: np.ndarray, starts: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Reads windows of tokens, and for each token the one that follows.

    Args:
        tokens: (count,).
        starts: (B,), of the windows; one that reaches beyond the end is filled up with targets that don't count.
        block: tokens of a window, N.

    Returns:
        Inputs and targets, (B, N) int64.
    """
    inputs = torch.zeros(len(starts), block, dtype=torch.long)
    targets = torch.full_like(inputs, IGNORED)
    for row, start in enumerate(starts.tolist()):
        part = torch.from_numpy(tokens[start : start + block + 1].astype(np.int64))
        inputs[row, : len(part) - 1], targets[row, : len(part) - 1] = part[:-1], part[1:]
    return inputs, targets


@dataclass(frozen=True)
class WindowOrder:
    """The order of training windows, a function of the seed alone.

    Attributes:
        tokens: how many there are.
        block: tokens of a window.
        seed: of the run.
    """

    tokens: int
    block: int
    seed: int

    @property
    def windows(self) -> int:
        """Returns the windows of a pass; there is room for each start within a window, so that cuts differ from pass to pass."""
        return max(1, self.tokens // self.block - 1)

    @lru_cache(maxsize=2)  # noqa: B019  # a batch may be of two passes; the order lives as long as its run
    def one_pass(self, number: int) -> Tensor:
        """Returns the starts of a pass's windows in their order, (windows,)."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, number, 0))
        spare = self.tokens - 1 - self.windows * self.block
        shift = int(torch.randint(spare + 1, (), generator=generator))
        return torch.randperm(self.windows, generator=generator) * self.block + shift

    def starts(self, first: int, count: int) -> Tensor:
        """Returns the starts of windows by their number over all passes, (count,).

        Args:
            first: number of the first one, from 0.
            count: how many.
        """
        numbers = torch.arange(first, first + count)
        passes = numbers.div(self.windows, rounding_mode="floor")
        parts = [self.one_pass(p)[numbers[passes == p] % self.windows] for p in passes.unique().tolist()]
        return torch.cat(parts)


@dataclass
class WindowLoader:
    """Training windows of one process, grouped into optimizer steps; see ``vit_tucker.data.loaders.TrainLoader``.

    Attributes:
        file: the tokens.
        order: of the windows.
        steps_per_epoch: optimizer steps.
        batch: windows of a step, over all processes and micro-batches.
        accumulation: micro-batches of a step.
        place: number of this process, and of all.
        pinned: for copies to a GPU.
    """

    file: TokenFile
    order: WindowOrder
    steps_per_epoch: int
    batch: int
    accumulation: int
    place: tuple[int, int]
    pinned: bool

    @property
    def num_samples(self) -> int:
        """Returns the number of training tokens."""
        return len(self.file.tokens)

    @property
    def description(self) -> str:
        """Returns one line for the log."""
        return f"{self.order.windows:,} windows in a pass, mapped from {self.file.path}"

    def steps(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """Yields each optimizer step's micro-batches, from ``start_step`` on."""
        rank, world = self.place
        for step in range(start_step, self.steps_per_epoch):
            starts = self.order.starts((epoch * self.steps_per_epoch + step) * self.batch, self.batch)
            parts = [shard(starts, n * world + rank, world * self.accumulation) for n in range(self.accumulation)]
            yield [make_batch(self.file.tokens, part, self.order.block, self.pinned) for part in parts]

    def close(self) -> None:
        """Does nothing: there are no workers."""


@dataclass
class EvalWindowLoader:
    """Evaluation windows of one process: every world-th, in order, so that each token is predicted once over all of them.

    Attributes:
        file, place, pinned: see ``WindowLoader``.
        block: tokens of a window.
        batch: windows of a batch.
    """

    file: TokenFile
    block: int
    batch: int
    place: tuple[int, int]
    pinned: bool

    @property
    def description(self) -> str:
        """Returns one line for the log."""
        return f"{self.num_targets:,} tokens in windows of {self.block}, mapped from {self.file.path}"

    @property
    def num_targets(self) -> int:
        """Returns how many tokens are predicted: all but the first."""
        return len(self.file.tokens) - 1

    def starts(self) -> Tensor:
        """Returns the starts of this process's windows."""
        return torch.arange(0, self.num_targets, self.block)[self.place[0] :: self.place[1]]

    def __len__(self) -> int:
        return -(-len(self.starts()) // self.batch)

    def __iter__(self) -> Iterator[Batch]:
        starts = self.starts()
        for part in starts.split(self.batch) if len(starts) else ():
            yield make_batch(self.file.tokens, part, self.block, self.pinned)

    def close(self) -> None:
        """Does nothing: there are no workers."""


def make_batch(tokens: np.ndarray, starts: Tensor, block: int, pinned: bool) -> Batch:
    """Returns windows as a batch.

    Args:
        tokens, starts, block: see ``read_windows``; (count,) and (B,).
        pinned: its memory is for copies to a GPU.
    """
    inputs, targets = read_windows(tokens, starts, block)
    return Batch(inputs.pin_memory(), targets.pin_memory()) if pinned else Batch(inputs, targets)


def build_token_loaders(
    data: DataConfig,
    train: TrainConfig,
    block: int,
    seed: int,
    rank: int,
    world_size: int,
    pin_memory: bool,
    with_train: bool = True,
) -> Loaders:
    """Opens the files of tokens of a run and builds the loaders of one process.

    Args:
        data, train: config sections.
        block: tokens of a window.
        seed: of the run.
        rank, world_size: this process.
        pin_memory: for copies to a GPU.
        with_train: open the training split too.

    Raises:
        DataError: a file is missing, or has fewer tokens than a window. ConfigError: an impossible batch size.
    """
    folder, place = Path(data.root).expanduser(), (rank, world_size)
    loader = None
    if with_train:
        file = open_tokens(folder, data.train_split)
        if len(file.tokens) <= block:
            raise DataError(f"{file.path}: {len(file.tokens):,} tokens, and data.block_size={block} needs more")
        refuse_uneven(train.global_batch_size, world_size, train.grad_accum_steps)
        order = WindowOrder(len(file.tokens), block, seed)
        if train.steps_per_epoch is None and train.global_batch_size > order.windows:
            raise ConfigError(
                f"train.global_batch_size={train.global_batch_size} is larger than the {order.windows} windows of "
                f"data.block_size={block} tokens in {file.path}; train.steps_per_epoch makes epochs of several passes"
            )
        steps = train.steps_per_epoch or order.windows // train.global_batch_size
        loader = WindowLoader(file, order, steps, train.global_batch_size, train.grad_accum_steps, place, pin_memory)
    evaluated = open_tokens(folder, data.val_split)
    micro_batch = max(1, train.global_batch_size // (world_size * train.grad_accum_steps))
    evaluation = EvalWindowLoader(evaluated, block, train.eval_batch_size or micro_batch, place, pin_memory)
    return Loaders(loader, evaluation, evaluation.num_targets, FaultLog(0))


def calibration_windows(data: DataConfig, block: int, windows: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yields batches (B, N) of training windows for a conversion, alike in every process.

    Args:
        data: config section.
        block: tokens of a window, N.
        windows: how many.
        batch: windows of a batch.
        seed: of the choice.

    Raises:
        DataError: the file is missing, or has fewer windows.
    """
    file = open_tokens(Path(data.root).expanduser(), data.train_split)
    order = WindowOrder(len(file.tokens), block, seed)
    if windows > order.windows:
        raise DataError(
            f"attention.calibration.images={windows}: {file.path} has {order.windows} windows of {block} tokens"
        )
    for part in order.starts(0, windows).split(batch):
        yield read_windows(file.tokens, part, block)[0]
