"""Compares a file with the model: the same images through both, errors of the logits, and how often the first class agrees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vit_tucker.errors import MismatchError, reason_of

ImageFunction = Callable[[Tensor], Tensor]
"""Images (B, channels, H, W) to logits (B, classes)."""
TOLERANCE = 1e-4
"""Largest error of a logit allowed, as a share of the largest logit. Float32 keeps 1.2e-7; runtimes add up in other orders, whose
differences stay below 2e-5 in all families that benchmarks/export_families.py tries. A wrong graph, a lost bias or another
kind of resampling is off by 1e-2 and more."""


@dataclass
class Comparison:
    """A file against its model on some images.

    Attributes:
        images: how many.
        max_abs_error: largest difference of an output.
        max_abs_output: largest output of the model.
        agreements: images whose largest output is the same one.
        labelled: images with a label.
        correct_model, correct_file: of these, how many each has right.
    """

    images: int = 0
    max_abs_error: float = 0.0
    max_abs_output: float = 0.0
    agreements: int = 0
    labelled: int = 0
    correct_model: int = 0
    correct_file: int = 0

    @property
    def relative_error(self) -> float:
        """Returns the largest error over the largest output."""
        return self.max_abs_error / self.max_abs_output if self.max_abs_output else self.max_abs_error

    @property
    def agreement(self) -> float:
        """Returns the share of images whose first class is the same."""
        return self.agreements / max(1, self.images)

    @property
    def accuracy_model(self) -> float | None:
        """Returns the share of labelled images that the model has right; None without labels."""
        return self.correct_model / self.labelled if self.labelled else None

    @property
    def accuracy_file(self) -> float | None:
        """Returns the same share of the file."""
        return self.correct_file / self.labelled if self.labelled else None

    def add(self, expected: Tensor, got: Tensor, labels: Tensor | None = None) -> None:
        """Adds a batch of outputs.

        Args:
            expected, got: (B, classes) of the model and of the file.
            labels: (B,) int64, -1 for none; None if there are no labels at all.

        Raises:
            MismatchError: the outputs have different shapes.
        """
        if expected.shape != got.shape:
            raise MismatchError(f"the file returns outputs {tuple(got.shape)}, the model {tuple(expected.shape)}")
        if len(expected) == 0:
            return
        difference = (expected.double() - got.double()).abs().max().item()
        self.max_abs_error = max(self.max_abs_error, difference) if difference == difference else float("inf")
        self.max_abs_output = max(self.max_abs_output, expected.abs().max().item())
        first, other = expected.flatten(1).argmax(1), got.flatten(1).argmax(1)
        self.images += len(expected)
        self.agreements += int((first == other).sum())
        if labels is not None:
            self.labelled += int((labels >= 0).sum())
            self.correct_model += int((first == labels).sum())
            self.correct_file += int((other == labels).sum())


def compare(
    model: ImageFunction, files: Mapping[str, ImageFunction], batches: Iterable[tuple[Tensor, Tensor | None]]
) -> dict[str, Comparison]:
    """Runs a model and files on batches of images, in one pass.

    Args:
        model: images (B, channels, height, width) -> outputs (B, classes).
        files: the same by name.
        batches: images, with labels (B,) or None.

    Raises:
        MismatchError: outputs of other shapes, or a runtime fails.
    """
    results = {name: Comparison() for name in files}
    for images, labels in batches:
        expected = model(images)
        for name, run in files.items():
            try:
                got = run(images)
            except Exception as error:
                reason = reason_of(error, 300)
                raise MismatchError(f"the file does not run on images {tuple(images.shape)}: {reason}") from None
            results[name].add(expected, got, labels)
    return results


def require(comparison: Comparison, tolerance: float, what: str) -> None:
    """Raises MismatchError if the error is above the tolerance, or no number.

    Args:
        comparison: on the images so far.
        tolerance: allowed error, relative to the largest output.
        what: the images, for the message.
    """
    if not comparison.relative_error <= tolerance:
        raise MismatchError(
            f"on {what} the file's outputs are off by {comparison.relative_error:.1e} of the largest one, {tolerance:.0e} is "
            f"allowed (top-1 agrees on {comparison.agreements} of {comparison.images} images)"
        )


def without_gradients(model: ImageFunction) -> ImageFunction:
    """Returns a model as a function of images that records nothing for gradients."""

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return model(images)

    return run


def random_batches(shapes: Iterable[tuple[int, int, int]], channels: int, unit: bool) -> list[tuple[Tensor, None]]:
    """Returns noise as images, the same each time: of [0, 1] (``unit``) or of mean 0 and standard deviation 1.

    Args:
        shapes: numbers of images, heights and widths.
        channels: of an image.
        unit: in [0, 1].
    """
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand if unit else torch.randn
    return [(draw(count, channels, *size, generator=generator), None) for count, *size in shapes]
