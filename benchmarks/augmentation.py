"""Augmentation of small data sets in memory: this package's batches against timm's, torchvision's and torch's own means.

    python benchmarks/augmentation.py [--epochs 2] [--turns 3] [--samples 3000] [--out benchmarks/results/augmentation]
    python benchmarks/augmentation.py --top1 0 1 2 3 4 [--case digits] [--epochs 15]

Whole training runs of digits and Fashion-MNIST, the same model and steps, in turns in this process, no loader workers.
Seconds are of the processor (user and system) in training steps, so that other jobs on the machine count less. The ways:

- own: `AugmentedBatches`, crops of a whole batch by antialiased matrix products, all random numbers of a batch at once;
- timm: timm's transform of single PIL images, generators seeded for each by (seed, epoch, image): `data.in_memory: false`;
- v2: torchvision.transforms.v2 on the pixels of single images in memory, seeded likewise;
- v2_grid: the parameters of torchvision's RandomResizedCrop for each image, seeded likewise, and one `grid_sample` for the batch;
- grid: this package's parameters, and one `grid_sample` for the batch. It has no antialiasing and does not round as Pillow does.

With `--top1` it trains once for each seed by `own` and by `timm` and writes the best top-1 of each run to top1.csv instead.
"""

import argparse
import csv
import platform
import resource
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
import torchvision
from torch import Tensor
from torch.nn.functional import grid_sample
from torchvision.transforms import InterpolationMode, v2

from vit_tucker.config.load import load_config
from vit_tucker.data import loaders
from vit_tucker.data.augmentation import draw_parameters
from vit_tucker.data.batches import Batch, augmentation_seed
from vit_tucker.data.datasets import DEBIAN_FASHION_MNIST
from vit_tucker.data.idx import read_idx
from vit_tucker.data.memory import AugmentedBatches, HeldImages
from vit_tucker.data.sampler import Key
from vit_tucker.data.seeding import seed_transforms
from vit_tucker.run.run import run

CASES = {"digits": "digits/tucker_r16", "fashion_mnist": "fashion_mnist/tucker_r16"}
TEST_IMAGES = 200
FIELDS = ("data", "way", "turn", "images", "cpu_s", "wall_s", "images_per_cpu_s", "loader_images_per_cpu_s")


def cpu_seconds() -> float:
    """Returns the processor time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class V2Images(AugmentedBatches):
    """torchvision's v2 on one image after the other."""

    def __init__(self, held: HeldImages, data: Any, resolved: dict[str, Any], seed: int) -> None:
        super().__init__(held, data, resolved, seed)
        self.seed = seed
        self.crop = v2.RandomResizedCrop(
            self.size, scale=data.scale, ratio=data.ratio, interpolation=InterpolationMode.BILINEAR, antialias=True
        )
        self.augment = v2.Compose([self.crop, v2.RandomHorizontalFlip(data.hflip)])
        self.pixels = held.pixels.transpose(1, 2).contiguous()  # (n, channels, height, width)

    def __getitem__(self, keys: list[Key]) -> Batch:
        images = []
        for epoch, index, repeat in keys:
            seed_transforms(augmentation_seed(self.seed, epoch, index, repeat))
            images.append(self.augment(self.pixels[index]))
        indices = torch.tensor([index for _, index, _ in keys])
        return Batch((torch.stack(images) * self.factor).add_(self.offset), self.held.labels[indices])


class Grid(V2Images):
    """One grid_sample for the batch, by this package's parameters."""

    def __getitem__(self, keys: list[Key]) -> Batch:
        indices = torch.tensor([index for _, index, _ in keys])
        boxes, flip = self.boxes(keys)
        images = crop_by_grid(self.pixels[indices], torch.from_numpy(boxes), torch.from_numpy(flip), self.size)
        return Batch(images.mul_(self.factor).add_(self.offset), self.held.labels[indices])

    def boxes(self, keys: list[Key]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (B, 4) crops, and whether each image is mirrored."""
        stored = self.pixels.shape[2], self.pixels.shape[3]
        parameters = draw_parameters(keys, self.key, self.data, stored, self.size)
        return parameters.boxes, parameters.hflip


class V2Grid(Grid):
    """One grid_sample for the batch, by torchvision's parameters."""

    def boxes(self, keys: list[Key]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (B, 4) crops, and whether each image is mirrored."""
        rows, flip = [], []
        for epoch, index, repeat in keys:
            seed_transforms(augmentation_seed(self.seed, epoch, index, repeat))
            found = self.crop.make_params([self.pixels[index]])
            rows.append([found["top"], found["left"], found["height"], found["width"]])
            flip.append(bool(torch.rand(1) < self.data.hflip))
        return np.array(rows), np.array(flip)


def crop_by_grid(pixels: Tensor, boxes: Tensor, flip: Tensor, size: tuple[int, int]) -> Tensor:
    """Crops and resizes each image by its own box, bilinearly, without antialiasing.

    Args:
        pixels: (B, channels, height, width) uint8.
        boxes: (B, 4): top, left, height, width.
        flip: (B,) bool, mirror the result.
        size: (height, width) of the result.
    """
    axes = []
    for axis, (out, full) in enumerate(zip(size, pixels.shape[2:], strict=True)):
        start, length = boxes[:, axis, None].float(), boxes[:, axis + 2, None].float()
        place = ((torch.arange(out) + 0.5) / out * length - 0.5).clamp(min=0).minimum(length - 1) + start
        axes.append((place + 0.5) * (2 / full) - 1)
    y, x = axes
    x = torch.where(flip[:, None], x.flip(1), x)
    count = len(pixels)
    grid = torch.stack([x[:, None].expand(count, *size), y[:, :, None].expand(count, *size)], dim=-1)
    return grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)


WAYS: dict[str, Callable[..., AugmentedBatches] | None] = {
    "own": AugmentedBatches,
    "timm": None,
    "v2": V2Images,
    "v2_grid": V2Grid,
    "grid": Grid,
}


def small_fashion_mnist(folder: Path) -> None:
    """Writes Fashion-MNIST with its first test images alone, so that evaluations don't hide what training costs."""
    for prefix in ("train", "t10k"):
        for kind, ndim in (("images", 3), ("labels", 1)):
            values = read_idx(DEBIAN_FASHION_MNIST / f"{prefix}-{kind}-idx{ndim}-ubyte.gz", ndim)
            values = values[:TEST_IMAGES] if prefix == "t10k" else values
            header = bytes([0, 0, 8, ndim]) + struct.pack(f">{ndim}I", *values.shape)
            (folder / f"{prefix}-{kind}-idx{ndim}-ubyte").write_bytes(header + values.tobytes())


def measure(case: str, way: str, epochs: int, samples: int, root: Path) -> dict[str, float]:
    """Runs a whole training; returns its images and the seconds of its training steps, and the rate of its loader alone."""
    spent: list[tuple[float, float]] = []
    kept: list[Any] = []
    build = loaders.build_loaders

    def keep(*args: Any, **kwargs: Any) -> Any:
        built = build(*args, **kwargs)
        assert built.train is not None
        kept.append((built.train, built.train.steps))
        vars(built.train)["steps"] = timed
        return built

    def timed(*args: Any) -> Any:
        cpu, wall = cpu_seconds(), time.perf_counter()
        yield from kept[0][1](*args)
        spent.append((cpu_seconds() - cpu, time.perf_counter() - wall))

    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"train.epochs={epochs}",
            "train.warmup_epochs=0",
            "data.num_workers=0",
            f"output_dir={folder}/run",
        ]
        overrides += [f"data.in_memory={'false' if way == 'timm' else 'auto'}"]
        if case == "fashion_mnist":
            overrides += [f"data.num_samples={samples}", f"data.root={root}"]
        config = load_config(CASES[case], overrides)
        kind = WAYS[way] or AugmentedBatches
        with mock.patch.object(loaders, "AugmentedBatches", kind), mock.patch("vit_tucker.run.run.build_loaders", keep):
            run(config)
    train, steps = kept[0]
    cpu, wall = (sum(column) for column in zip(*spent, strict=True))
    images = epochs * train.steps_per_epoch * config.train.global_batch_size
    alone = cpu_seconds()
    for _ in steps(epochs):
        pass
    alone = cpu_seconds() - alone
    return {
        "images": images,
        "cpu_s": round(cpu, 2),
        "wall_s": round(wall, 2),
        "images_per_cpu_s": round(images / cpu),
        "loader_images_per_cpu_s": round(images / epochs / alone),
    }


def best_top1(case: str, way: str, seed: int, epochs: int, samples: int) -> float:
    """Runs a whole training; returns the best top-1 of its evaluations, in percent."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"seed={seed}", f"train.epochs={epochs}", "data.num_workers=0", f"output_dir={folder}/run"]
        overrides += [f"data.in_memory={'false' if way == 'timm' else 'auto'}"]
        overrides += [f"data.num_samples={samples}"] if case == "fashion_mnist" else []
        run(load_config(CASES[case], overrides))
        with next(Path(folder).rglob("summary.csv")).open() as file:
            return max(float(row["eval_top1"]) for row in csv.DictReader(file))


def write_top1(args: argparse.Namespace) -> None:
    """Trains by this package's and by timm's transform, in turns, and adds a row for each run to top1.csv."""
    file = args.out / "top1.csv"
    new = not file.is_file()
    for seed in args.top1:
        for way in ("own", "timm"):
            top1 = best_top1(args.case, way, seed, args.epochs, args.samples)
            samples = args.samples if args.case == "fashion_mnist" else "all"
            row = {"data": args.case, "config": CASES[args.case], "epochs": args.epochs, "images": samples}
            row |= {"way": way, "seed": seed, "top1": f"{top1:.2f}"}
            print(row, flush=True)
            with file.open("a", newline="") as out:
                writer = csv.DictWriter(out, row, lineterminator="\n")
                if new:
                    writer.writeheader()
                new = False
                writer.writerow(row)


def main() -> None:
    """Writes augmentation.csv, and prints how much slower each way is than this package's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--samples", type=int, default=3000, help="training images of Fashion-MNIST")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--top1", type=int, nargs="+", metavar="SEED", help="compare top-1 by these seeds")
    parser.add_argument("--case", choices=CASES, default="digits", help="of --top1")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/augmentation"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.top1:
        write_top1(args)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        small_fashion_mnist(Path(folder))
        measure("digits", "own", 1, args.samples, Path(folder))  # what is only slow the first time
        for case in CASES:
            for turn in range(args.turns):
                for way in args.ways:
                    measured = measure(case, way, args.epochs, args.samples, Path(folder))
                    rows.append({"data": case, "way": way, "turn": turn, **measured})
                    print(rows[-1], flush=True)
    with (args.out / "augmentation.csv").open("w", newline="") as file:
        versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
        file.write(f"# {versions}, Python {platform.python_version()}, {torch.get_num_threads()} threads, no workers\n")
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for case in CASES:
        for key in ("images_per_cpu_s", "loader_images_per_cpu_s"):
            of = {way: [row[key] for row in rows if row["data"] == case and row["way"] == way] for way in args.ways}
            text = (
                f"{way} {statistics.median(a / b for a, b in zip(of[args.ways[0]], of[way], strict=True)):.2f}x"
                for way in args.ways
            )
            print(f"{case}, {key}: slower than {args.ways[0]}: {', '.join(text)}")


if __name__ == "__main__":
    main()
