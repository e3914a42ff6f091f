"""Export a model to a file: recorded, written under another name, compared with the model, and only then renamed."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vit_tucker.export.capture import capture, served
from vit_tucker.export.check import Batches, Check, ExportOptions, Written
from vit_tucker.export.compare import ImageFunction
from vit_tucker.export.metadata import file_metadata
from vit_tucker.version import __version__


@dataclass(frozen=True)
class Exported:
    """The result of an export: the file, and how it compares with PyTorch.

    Attributes:
        path: the file.
        parameter_bytes: of the recorded model's parameters in float32.
        stages: the float32 file, then the int8 file if that was asked for; the last one is at ``path``.
        int8_products: how many products of tokens with weights are in int8; None for float32.
        weight_bits: of their weights, 8 or 7; None for float32.
    """

    path: Path
    parameter_bytes: int
    stages: tuple[Written, ...]
    int8_products: int | None = None
    weight_bits: int | None = None


def export_model(
    model: nn.Module,
    file: str | Path,
    options: ExportOptions | None = None,
    *,
    batches: Batches | None = None,
    reference: nn.Module | None = None,
    strict: bool = True,
) -> Exported:
    """Writes a model, patched or plain, as a file for other runtimes; float32 or int8, any number of images.

    The input is ``image`` (batch, channels, height, width), float32; the output ``logits`` (batch, classes).

    Args:
        model: of timm, on any device; it is not touched.
        file: to write; one that is there is replaced.
        options: ONNX of the model's own image size if None.
        batches: real images to compare on besides noise, normalised, with labels for the accuracy.
        reference: what the file must compute; ``model`` itself if None.
        strict: the float32 file must agree with it; else errors are only reported.

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
    metadata = file_metadata(model, options.with_preprocessing, __version__)
    expected = plain if reference is None else served(reference, options.with_preprocessing)
    check = Check(expected, model, options, batches, strict)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        first, products, bits = Path(folder) / file.name, None, None
        runners = {"float32": _write(program, first, metadata, options)}
        check.noise(runners, "float32")
        sizes = {"float32": folder_bytes(first.parent)}
        if options.int8:
            last = first.parent / "int8" / file.name
            products, bits, runners["int8"] = _quantise(first, last, options.reduce_range)
            check.noise(runners, "int8")
            sizes["int8"] = folder_bytes(last.parent)
            first = last
        check.real(runners)
        for part in list(first.parent.iterdir()):
            if part.is_file():
                part.replace(file.parent / part.name)
    stages = tuple(Written(name, sizes[name], *check.results(name)) for name in runners)
    return Exported(file, 4 * sum(p.numel() for p in plain.parameters()), stages, products, bits)


def _write(program: Any, file: Path, metadata: dict[str, str], options: ExportOptions) -> ImageFunction:
    """Writes the float32 file, and returns what runs it."""
    if options.format == "onnx":
        from vit_tucker.export.onnx_file import onnx_runner, write_onnx

        write_onnx(program, file, metadata, options.opset)
        return onnx_runner(file)
    from vit_tucker.export.torch_file import torch_export_runner, write_torch_export

    write_torch_export(program, file, metadata)
    return torch_export_runner(file)


def _quantise(file: Path, out: Path, reduce_range: bool | None) -> tuple[int, int, ImageFunction]:
    """Writes the int8 file; returns how many products it has in int8, the bits of their weights, and what runs it."""
    from vit_tucker.export.int8 import products_saturate, quantise
    from vit_tucker.export.onnx_file import onnx_runner

    out.parent.mkdir()
    reduced = products_saturate() if reduce_range is None else reduce_range
    return quantise(file, out, reduce_range=reduced), 7 if reduced else 8, onnx_runner(out)


def folder_bytes(folder: Path) -> int:
    """Returns the bytes of all files directly in a folder."""
    return sum(part.stat().st_size for part in folder.iterdir() if part.is_file())
