"""Patched models as plain timm models: in memory, and as folders that timm loads without vit_tucker."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import timm
from timm.models import parse_model_name
from torch import nn

from vit_tucker.checkpoint.describe import creation_arguments, image_options, set_image_options
from vit_tucker.checkpoint.load import load
from vit_tucker.checkpoint.save import save
from vit_tucker.errors import ExportError, PatchError
from vit_tucker.export.capture import served
from vit_tucker.export.check import Batches, Check, ExportOptions, Written
from vit_tucker.export.compare import TOLERANCE, ImageFunction, without_gradients
from vit_tucker.patching.merge import Merged, MergedLayer, merge
from vit_tucker.patching.record import host_name, patch_records


@dataclass(frozen=True)
class DenseFolder:
    """The result of a dense export.

    Attributes:
        path: the folder, in timm's hub layout.
        parameter_bytes: of its model in float32.
        stages: the folder, loaded anew, compared with the patched model.
        layers: what became of each patched layer.
    """

    path: Path
    parameter_bytes: int
    stages: tuple[Written, ...]
    layers: tuple[MergedLayer, ...]


def dense_model(model: nn.Module, host: nn.Module | None = None, *, approximate: bool = False) -> nn.Module:
    """Returns the plain timm model that is equal to a patched one: its state dict is timm's own and needs no vit_tucker.

    Exact for MHA, GQA and MLA, and for Tucker Attention whose matrices have rank head_dim at most, which ranks r2 <= head_dim or
    r3 <= head_dim grant; with RoPE for MHA and GQA, and for MLA where norms keep its heads apart. The attention is dense again,
    so that parameters and time are those of the host: this is for tools and runtimes that want plain attention.

    Args:
        model: patched, or plain: then a copy.
        host: the timm model before it was patched, weights of any values, on the CPU; None for the modules that ``patch`` kept,
            or a model made anew by the name and arguments of the patched one. Not changed.
        approximate: cut what does not fit to the nearest that does (truncated SVD of each head); ``merge_dense`` returns how much
            is lost.

    Returns:
        A new model with the device, dtype and mode of the patched one.

    Raises:
        PatchError: a layer has no dense form of the host's shape, or there is no host to write into.
    """
    return merge_dense(model, host, approximate=approximate).model


def merge_dense(model: nn.Module, host: nn.Module | None = None, *, approximate: bool = False) -> Merged:
    """Makes the model of ``dense_model``, with an account of each layer.

    Args:
        model: patched or plain; it is not touched.
        host, approximate: see ``dense_model``.

    Returns:
        The dense model, and for each layer whether it is exact or what is lost.

    Raises:
        PatchError: see ``dense_model``.
    """
    if host is None and any(record.originals is None for record in patch_records(model).values()):
        architecture = host_name(model)
        if architecture is None:
            raise PatchError(
                "the modules that were replaced were not kept, and the model does not name its timm model: give that "
                "as host"
            )
        host = timm.create_model(architecture, **creation_arguments(model, architecture))
    return merge(model, host, approximate=approximate)


def export_dense(
    model: nn.Module,
    folder: str | Path,
    *,
    approximate: bool = False,
    batches: Batches | None = None,
    tolerance: float = TOLERANCE,
) -> DenseFolder:
    """Writes a model as a folder in timm's hub layout with plain attention.

    timm alone loads it::

        timm.create_model("local-dir:FOLDER", pretrained=True)

    Args:
        model: patched or plain.
        folder: to write; it must not hold anything yet.
        approximate: see ``dense_model``; then errors are reported and none is too large.
        batches: real images to compare on besides noise, normalised, with labels for the accuracy.
        tolerance: largest error of a logit over the largest logit, see ``compare.TOLERANCE``.

    Raises:
        PatchError: see ``dense_model``. ExportError: there is something in the folder. CheckpointError: see ``save``.
        MismatchError: the folder does not compute what the model does. Nothing is written then.
    """
    folder, options = Path(folder), ExportOptions("torch_export", tolerance=tolerance)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ExportError(f"{folder}: the folder is not empty; name a new one")
    merged = merge_dense(model, approximate=approximate)
    set_image_options(merged.model, image_options(model))
    exact = all(layer.exact for layer in merged.layers)
    check = Check(served(model, False), model, options, batches, strict=exact)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
        written = save(merged.model, Path(beside) / folder.name)
        runners = {"float32": folder_runner(written)}
        check.noise(runners, "float32")
        check.real(runners)
        size = sum(file.stat().st_size for file in written.iterdir())
        if folder.is_dir():
            folder.rmdir()
        written.rename(folder)
    parameters = 4 * sum(p.numel() for p in merged.model.parameters())
    return DenseFolder(folder, parameters, (Written("float32", size, *check.results("float32")),), merged.layers)


def folder_runner(folder: Path) -> ImageFunction:
    """Returns the model of a folder, loaded as a user of timm does; by ``vit_tucker.load`` where timm reads no folders yet."""
    try:
        parse_model_name(f"local-dir:{folder}")
    except AssertionError:
        model = load(folder)
    else:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return without_gradients(model)
