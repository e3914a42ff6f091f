"""Images for benchmarks/engine.py: ten classes that can be learnt, the same pixels on every machine."""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES, EVAL_IMAGES = 10, 20
SMALL = {"img_size": 28, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 8, "mlp_ratio": 2}


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        size, channels: of the stored images, in pixels.
        suffix: of the image files.
        model: arguments of timm.create_model beyond its name, for both sides.
        batch_size: images per step.
        steps: of the epoch; a multiple of the interval, plus 1.
        interval: steps between log points.
        memory: ours reads the images as Fashion-MNIST files.
    """

    size: int
    channels: int
    suffix: str
    model: dict[str, Any]
    batch_size: int
    steps: int
    interval: int
    memory: bool = False

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Of the model: channels, height, width."""
        side = self.model.get("img_size", 224)
        return self.channels, side, side


CASES = {
    "jpeg224": Case(256, 3, "jpg", {}, 16, steps=26, interval=5),
    "png28": Case(28, 1, "png", SMALL, 64, steps=61, interval=10),
    "memory28": Case(28, 1, "png", SMALL, 64, steps=61, interval=10, memory=True),
}


def draw(case: Case, number: int) -> np.ndarray:
    """Draws image ``number``, (H, W, C) uint8: waves that depend on its class, and light and two discs of its own."""
    generator, label = np.random.default_rng((7, number)), number % CLASSES
    y, x = np.mgrid[: case.size, : case.size] / case.size
    angle = np.pi * label / CLASSES
    waves = np.sin(2 * np.pi * (3 + label) * (x * np.cos(angle) + y * np.sin(angle)) + generator.uniform(0, 6))
    pixels = 120 + 50 * waves[..., None] * generator.uniform(0.5, 1, case.channels)
    for centre_y, centre_x, radius in generator.uniform(0.1, 0.9, (2, 3)):
        disc = (y - centre_y) ** 2 + (x - centre_x) ** 2 < (0.3 * radius) ** 2
        pixels[disc] += generator.uniform(-60, 60, case.channels)
    return pixels.clip(0, 255).astype(np.uint8)


def write_images(case: Case, folder: Path) -> None:
    """folder/{train,validation}/<class>/<number>.<suffix>; for ``memory`` also folder/fashion_mnist/*.gz with the same images."""
    for split, prefix, numbers in (
        ("train", "train", range(case.batch_size * case.steps)),
        ("validation", "t10k", range(case.batch_size * case.steps, case.batch_size * case.steps + EVAL_IMAGES)),
    ):
        kept = []
        for number in numbers:
            image = draw(case, number)
            file = folder / split / f"class{number % CLASSES}" / f"{number:06d}.{case.suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.squeeze()).save(file, quality=90)
            kept += [image] if case.memory else []
        if case.memory:
            (folder / "fashion_mnist").mkdir(exist_ok=True)
            pixels, labels = np.stack(kept).squeeze(-1), np.array([n % CLASSES for n in numbers], np.uint8)
            for name, array in ((f"{prefix}-images-idx3-ubyte.gz", pixels), (f"{prefix}-labels-idx1-ubyte.gz", labels)):
                header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
                (folder / "fashion_mnist" / name).write_bytes(gzip.compress(header + array.tobytes()))
