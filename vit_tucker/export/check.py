"""Defines the options of an export, and compares what was written with the model: on noise, then on real images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vit_tucker.errors import ExportError, nearest
from vit_tucker.export.capture import normalisation
from vit_tucker.export.compare import (
    TOLERANCE,
    Comparison,
    ImageFunction,
    compare,
    random_batches,
    require,
    without_gradients,
)
from vit_tucker.export.onnx_file import OLDEST_OPSET, require_packages
from vit_tucker.export.sizes import sizes_to_compare
from vit_tucker.hosts.images import input_shape

FORMATS = ("onnx", "torch_export")
"""Of single files."""
Batches = Iterable[tuple[Tensor, Tensor | None]]
"""Images (B, channels, H, W), normalised as the model takes them, and labels (B,) or None."""


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export: its format, inputs and checks.

    Attributes:
        format: "onnx", or "torch_export" for torch's own (.pt2).
        dynamic_img_size: take images of any size, too; where the model does.
        with_preprocessing: take images in [0, 1] and normalise them inside.
        opset: of ONNX; the exporter's own if None.
        int8: quantise the ONNX file, see ``vit_tucker.export.int8``; the float32 file must pass first.
        reduce_range: of int8: weights of 7 bits, for x86 CPUs without VNNI; None: where this machine needs it.
        tolerance: largest error of a logit over the largest logit, see ``compare.TOLERANCE``.
    """

    format: str = "onnx"
    dynamic_img_size: bool = False
    with_preprocessing: bool = False
    opset: int | None = None
    int8: bool = False
    reduce_range: bool | None = None
    tolerance: float = TOLERANCE

    def check(self) -> None:
        """Raises ExportError for options that don't fit together or need packages that are missing."""
        if self.format not in FORMATS:
            raise ExportError(
                f"unknown format '{self.format}': one of {', '.join(FORMATS)}{nearest(self.format, FORMATS)}"
            )
        if self.format != "onnx" and (self.int8 or self.opset is not None):
            raise ExportError(f"{'int8' if self.int8 else 'opset'} is an option of onnx, not of {self.format}")
        if self.opset is not None and self.opset < OLDEST_OPSET:
            raise ExportError(f"opset {self.opset}: torch's exporter writes {OLDEST_OPSET} and later")
        if self.reduce_range is not None and not self.int8:
            raise ExportError("reduce_range is an option of int8")
        if self.format == "onnx":
            require_packages()


@dataclass(frozen=True)
class Written:
    """A file, or one on the way to it, and how it compares with its model.

    Attributes:
        label: "float32" or "int8".
        bytes: its size, weights in a file beside it included.
        random: compared on noise, other numbers of images (and sizes) than it was recorded with.
        real: compared on the images given; None without.
    """

    label: str
    bytes: int
    random: Comparison
    real: Comparison | None


class Check:
    """The model that files are compared with, and the images of the comparison.

    Args:
        expected: what they must compute, see ``served``.
        model: whose sizes of images count.
        options: of the export; int8 has no tolerance.
        batches: real images, normalised; None for none.
        strict: float32 must agree; else errors are only reported.
    """

    def __init__(
        self,
        expected: nn.Module,
        model: nn.Module,
        options: ExportOptions,
        batches: Batches | None,
        strict: bool = True,
    ) -> None:
        self.run, self.options, self.batches, self.strict = without_gradients(expected), options, batches, strict
        shapes = sizes_to_compare(model, options.dynamic_img_size)
        self.shape = input_shape(model)
        self.random = random_batches(shapes, self.shape[0], unit=options.with_preprocessing)
        self.scale = normalisation(model) if options.with_preprocessing else None
        self.on_noise: dict[str, Comparison] = {}
        self.on_real: dict[str, Comparison] = {}

    def noise(self, runners: dict[str, ImageFunction], name: str) -> None:
        """Compares one of the files on noise; float32 must agree."""
        self.on_noise |= compare(self.run, {name: runners[name]}, self.random)
        if name == "float32" and self.strict:
            require(self.on_noise[name], self.options.tolerance, "random images")

    def real(self, runners: dict[str, ImageFunction]) -> None:
        """Compares all files on the real images, in one pass; float32 must agree, else ExportError is raised."""
        if self.batches is not None:
            self.on_real = compare(self.run, runners, self.images())
            if self.on_real["float32"].images == 0:
                raise ExportError("there are no images to compare on")
            if self.strict:
                require(self.on_real["float32"], self.options.tolerance, "the images given")

    def results(self, name: str) -> tuple[Comparison, Comparison | None]:
        """Returns the comparisons on noise and on real images."""
        return self.on_noise[name], self.on_real.get(name)

    def images(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yields the real images as the file expects them; raises ExportError for images of another shape."""
        for images, labels in self.batches or ():
            images = images.detach().to("cpu", torch.float32)
            fixed = 1 if self.options.dynamic_img_size else 3
            if tuple(images.shape[1 : 1 + fixed]) != self.shape[:fixed]:
                given, taken = ("x".join(map(str, shape)) for shape in (images.shape[1:], self.shape))
                raise ExportError(f"the images to compare on are {given}, the model accepts {taken}")
            if self.scale is not None:
                mean, std = (torch.tensor(values).view(-1, 1, 1) for values in self.scale)
                images = images * std + mean
            yield images, labels
