"""Images/s of the training loader alone: read one by one with timm's transform, and held in memory and augmented in batches.

    python benchmarks/loader.py [--seconds 2] [--turns 5] [--workers 0]

Both ways in turns in this process, the median of the turns; random images of the sizes of digits, Fashion-MNIST and CIFAR.
"""

import argparse
import statistics
import time
from typing import Any
from unittest import mock

import numpy as np

from vit_tucker.config.schema import DataConfig, TrainConfig
from vit_tucker.data import loaders
from vit_tucker.data.datasets import ArrayDataset
from vit_tucker.data.loaders import Loaders, build_loaders
from vit_tucker.data.vision import ConvertedDataset

DIGITS = {"scale": (0.75, 1.0), "ratio": (0.85, 1.18), "interpolation": "bilinear", "hflip": 0.0}
FASHION = {"scale": (0.85, 1.0), "ratio": (0.9, 1.11), "interpolation": "bilinear"}
CIFAR = {"scale": (0.6, 1.0), "ratio": (0.8, 1.25)}
CASES: dict[
    str, tuple[int, int, int, dict[str, Any]]
] = {  # side of the stored image, channels, side of the result, recipe
    "8 -> 16, crops (digits)": (8, 1, 16, DIGITS),
    "28 -> 28, crops, flips (Fashion-MNIST)": (28, 1, 28, FASHION),
    "32 -> 32, crops, flips (CIFAR)": (32, 3, 32, CIFAR),
    "32 -> 32, and erasing": (32, 3, 32, {**CIFAR, "reprob": 0.25}),
    "32 -> 224, timm's defaults": (32, 3, 224, {}),
}
IMAGES, BATCH = 4096, 128


class Colour:
    """torchvision's CIFAR: PIL images from an array ``data``."""

    def __init__(self, side: int) -> None:
        from PIL import Image

        self.data = np.random.default_rng(0).integers(0, 256, (IMAGES, side, side, 3), dtype=np.uint8)
        self.image = Image.fromarray

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.image(self.data[index]), index % 10


def make(side: int, channels: int, size: int, recipe: dict[str, Any], in_memory: bool, workers: int) -> Loaders:
    """Loaders of one way."""
    grey = np.random.default_rng(0).integers(0, 256, (IMAGES, side, side), dtype=np.uint8)
    dataset = (
        ConvertedDataset(Colour(side), "RGB") if channels == 3 else ArrayDataset(grey, np.arange(IMAGES) % 10, "L")
    )
    data = DataConfig(num_workers=workers, in_memory="auto" if in_memory else False, **recipe)
    resolved: dict[str, Any] = {"input_size": (channels, size, size)}
    resolved |= {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    resolved |= {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    with mock.patch.object(loaders, "load_dataset", return_value=dataset):
        return build_loaders(data, TrainConfig(global_batch_size=BATCH), resolved, 0, 0, 1, pin_memory=False)


def rate(loader: Loaders, seconds: float, epoch: int) -> float:
    """Images/s; the first step apart, which starts workers."""
    assert loader.train is not None
    count, started = 0, 0.0
    while True:
        for number, (batch,) in enumerate(loader.train.steps(epoch)):
            if started == 0.0:
                started = time.perf_counter()
                continue
            count += len(batch.labels)
            if number % 4 == 0 and time.perf_counter() - started > seconds:
                return count / (time.perf_counter() - started)


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    for name, (side, channels, size, recipe) in CASES.items():
        ways = [make(side, channels, size, recipe, in_memory, args.workers) for in_memory in (False, True)]
        turns = [[rate(way, args.seconds, turn) for way in ways] for turn in range(args.turns)]
        single, batched = (statistics.median(column) for column in zip(*turns, strict=True))
        ratios = sorted(b / a for a, b in turns)
        middle = statistics.median(ratios)
        print(
            f"{name:40} one by one {single:8,.0f}  in batches {batched:8,.0f} images/s  "
            f"ratio {middle:.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})",
            flush=True,
        )
        for way in ways:
            way.close()


if __name__ == "__main__":
    main()
