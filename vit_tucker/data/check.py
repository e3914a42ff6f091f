"""The check of ``data.check``: every image is opened once before a run, so that all bad ones are known."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from vit_tucker.config.schema import DataConfig
from vit_tucker.data.batches import BadImageError, read_image
from vit_tucker.data.datasets import is_iterable
from vit_tucker.data.splits import open_splits
from vit_tucker.data.workers import WorkerLoader

MANY = 512
"""Images from which worker processes pay."""


class Readings(Dataset):
    """The result of reading each image of a share: its fault line, or None.

    Args:
        dataset: map-style, yields (PIL image, int).
        split: its name.
        share: indices of the images.
    """

    def __init__(self, dataset: Any, split: str, share: range) -> None:
        self.dataset, self.split, self.share = dataset, split, share

    def __len__(self) -> int:
        return len(self.share)

    def __getitem__(self, index: int) -> str | None:
        try:
            read_image(self.dataset, self.share[index], self.split)
        except BadImageError as error:
            return str(error)
        return None


def unreadable(
    data: DataConfig,
    channels: int,
    with_train: bool,
    classes: Sequence[str] | None,
    num_classes: int,
    rank: int,
    world_size: int,
) -> list[str]:
    """Reads this process's share of a run's images, every world_size-th of each split; of a stream nothing.

    Args:
        data, channels, with_train, classes, num_classes: see ``open_splits``.
        rank, world_size: this process; the first one shows a progress bar, on a terminal.

    Returns:
        The fault lines of those that can't be read.

    Raises:
        DataError: see ``open_splits``.
    """
    splits = open_splits(data, channels, with_train=with_train, classes=classes, num_classes=num_classes)
    opened = {data.train_split: splits.train} if with_train else {}
    opened[data.val_split] = splits.eval
    lines: list[str] = []
    for split, dataset in opened.items():
        if is_iterable(dataset):
            continue
        readings = Readings(dataset, split, range(rank, len(dataset), world_size))
        loader = WorkerLoader(
            readings,
            batch_size=32,
            collate_fn=list,
            num_workers=data.num_workers if len(readings) >= MANY else 0,
            generator=torch.Generator(),  # else it would draw from the global one
        )
        title, hidden = f"checking split '{split}'", None if rank == 0 else True
        with tqdm(total=len(readings), desc=title, unit="images", disable=hidden, leave=False) as bar:
            for batch in loader:
                lines += [line for line in batch if line is not None]
                bar.update(len(batch))
    return lines
