"""Export a model to a file: recorded, written under another name, compared with the model, and only then renamed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.errors import ExportError, nearest
from vit_tucker.export.capture import capture, normalisation, served
from vit_tucker.export.compare import TOLERANCE, Comparison, Runner, compare, random_batches, require
from vit_tucker.export.metadata import describe
from vit_tucker.export.sizes import check_sizes
from vit_tucker.patching.probe import input_shape

ENDINGS = {"onnx": ".onnx", "torch_export": ".pt2"}
"""Formats of single files, and how their names end."""
Batches = Iterable[tuple[Tensor, Tensor | None]]
"""Images (B, channels, H, W), normalised as the model takes them, and labels (B,) or None."""


@dataclass(frozen=True)
class ExportOptions:
    """What is written.

    Attributes:
        format: "onnx", or "torch_export" for torch's own (.pt2).
        dynamic_img_size: take images of any size, too; where the model does.
        with_preprocessing: take images in [0, 1] and normalise them inside.
        opset: of ONNX; the exporter's own if None.
        int8: quantise the ONNX file, see ``vit_tucker.export.int8``; the float32 file must pass first.
        reduce_range: of int8: weights of 7 bits, for CPUs without VNNI.
        tolerance: largest error of a logit over the largest logit, see ``compare.TOLERANCE``.
    """

    format: str = "onnx"
    dynamic_img_size: bool = False
    with_preprocessing: bool = False
    opset: int | None = None
    int8: bool = False
    reduce_range: bool = False
    tolerance: float = TOLERANCE

    def check(self) -> None:
        """Raise ExportError for options that don't fit together or need packages that are missing."""
        if self.format not in ENDINGS:
            raise ExportError(
                f"unknown format '{self.format}': one of {', '.join(ENDINGS)}{nearest(self.format, ENDINGS)}"
            )
        if self.format == "onnx":
            from vit_tucker.export.onnx_file import require_packages

            require_packages()
        elif self.int8 or self.opset is not None:
            raise ExportError(f"{'int8' if self.int8 else 'opset'} is an option of onnx, not of {self.format}")
        if self.reduce_range and not self.int8:
            raise ExportError("reduce_range is an option of int8")


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


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        file: the file.
        parameter_bytes: of the recorded model's parameters in float32.
        stages: the float32 file, then the int8 file if that was asked for; the last one is ``file``.
        int8_products: how many products of tokens with weights are in int8; None for float32.
    """

    file: Path
    parameter_bytes: int
    stages: tuple[Written, ...]
    int8_products: int | None = None


def export_model(
    model: nn.Module,
    file: str | Path,
    options: ExportOptions | None = None,
    *,
    batches: Batches | None = None,
    reference: nn.Module | None = None,
) -> Exported:
    """Write a model, patched or plain, as a file for other runtimes; float32 or int8, any number of images.

    The input is ``image`` (batch, channels, height, width), float32; the output ``logits`` (batch, classes).

    Args:
        model: of timm, on any device; it is not touched.
        file: to write; one that is there is replaced.
        options: ONNX of the model's own image size if None.
        batches: real images to compare on besides noise, normalised, with labels for the accuracy.
        reference: what the file must compute; ``model`` itself if None.

    Returns:
        What was written and how it compares.

    Raises:
        ExportError: the model can't be exported as asked, or a package is missing; nothing is written.
        MismatchError: the file does not compute what the model does; nothing is left under its name.
    """
    file, options = Path(file), options or ExportOptions()
    options.check()
    plain = served(model, options.with_preprocessing)
    program = capture(plain, options.dynamic_img_size)
    metadata = describe(model, options.with_preprocessing, _version())
    expected = plain if reference is None else served(reference, options.with_preprocessing)
    check = Check(expected, model, options, batches)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        first, products = Path(folder) / file.name, None
        runners = {"float32": _write(program, first, metadata, options)}
        check.noise(runners, "float32")
        sizes = {"float32": folder_bytes(first.parent)}
        if options.int8:
            last = first.parent / "int8" / file.name
            products, runners["int8"] = _quantise(first, last, options.reduce_range)
            check.noise(runners, "int8")
            sizes["int8"] = folder_bytes(last.parent)
            first = last
        check.real(runners)
        for part in list(first.parent.iterdir()):
            if part.is_file():
                part.replace(file.parent / part.name)
    stages = tuple(Written(name, sizes[name], *check.results(name)) for name in runners)
    return Exported(file, 4 * sum(p.numel() for p in plain.parameters()), stages, products)


class Check:
    """What files are compared with, and on which images.

    Args:
        expected: what they must compute, see ``served``.
        model: whose sizes of images count.
        options: of the export; int8 has no tolerance.
        batches: real images, normalised; None for none.
    """

    def __init__(self, expected: nn.Module, model: nn.Module, options: ExportOptions, batches: Batches | None) -> None:
        self.expected, self.options, self.batches = expected, options, batches
        shapes = check_sizes(model, options.dynamic_img_size)
        self.shape = input_shape(model)
        self.random = random_batches(shapes, self.shape[0], unit=options.with_preprocessing)
        self.scale = normalisation(model) if options.with_preprocessing else None
        self.on_noise: dict[str, Comparison] = {}
        self.on_real: dict[str, Comparison] = {}

    def noise(self, runners: dict[str, Runner], name: str) -> None:
        """Compare one of the files on noise; float32 must agree."""
        self.on_noise |= compare(self.run, {name: runners[name]}, self.random)
        if name == "float32":
            require(self.on_noise[name], self.options.tolerance, "random images")

    def real(self, runners: dict[str, Runner]) -> None:
        """Compare all files on the real images, in one pass; float32 must agree."""
        if self.batches is not None:
            self.on_real = compare(self.run, runners, self.images())
            if self.on_real["float32"].images == 0:
                raise ExportError("there are no images to compare on")
            require(self.on_real["float32"], self.options.tolerance, "the images given")

    def results(self, name: str) -> tuple[Comparison, Comparison | None]:
        """On noise and on real images."""
        return self.on_noise[name], self.on_real.get(name)

    def run(self, images: Tensor) -> Tensor:
        """What the model says."""
        with torch.no_grad():
            y: Tensor = self.expected(images)
        return y

    def images(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The real images as the file takes them."""
        for images, labels in self.batches or ():
            images = images.detach().to("cpu", torch.float32)
            fixed = 1 if self.options.dynamic_img_size else 3
            if tuple(images.shape[1 : 1 + fixed]) != self.shape[:fixed]:
                given, taken = ("x".join(map(str, shape)) for shape in (images.shape[1:], self.shape))
                raise ExportError(f"the images to compare on are {given}, the model takes {taken}")
            if self.scale is not None:
                mean, std = (torch.tensor(values).view(-1, 1, 1) for values in self.scale)
                images = images * std + mean
            yield images, labels


def _write(program: Any, file: Path, metadata: dict[str, str], options: ExportOptions) -> Runner:
    """Write the file, and give what runs it."""
    if options.format == "onnx":
        from vit_tucker.export.onnx_file import onnx_runner, write_onnx

        write_onnx(program, file, metadata, options.opset)
        return onnx_runner(file)
    from vit_tucker.export.torch_file import torch_export_runner, write_torch_export

    write_torch_export(program, file, metadata)
    return torch_export_runner(file)


def _quantise(file: Path, out: Path, reduce_range: bool) -> tuple[int, Runner]:
    """Write the int8 file; how many products it has in int8, and what runs it."""
    from vit_tucker.export.int8 import quantise
    from vit_tucker.export.onnx_file import onnx_runner

    out.parent.mkdir()
    return quantise(file, out, reduce_range=reduce_range), onnx_runner(out)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files directly in a folder."""
    return sum(part.stat().st_size for part in folder.iterdir() if part.is_file())


def _version() -> str:
    """Of vit_tucker, as installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vit_tucker")
    except PackageNotFoundError:
        return "from source"
