"""A stored model as a file for other runtimes or as plain timm, compared with PyTorch on real images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

from timm.data import resolve_data_config
from torch import nn

from vit_tucker.data.datasets import INFO, dataset_info
from vit_tucker.data.folders import is_folder_set
from vit_tucker.data.samples import Labelled, evaluation_images, file_images
from vit_tucker.errors import ConfigError, DataError, ExportError, nearest
from vit_tucker.export import Comparison, DenseFolder, Exported, ExportOptions, export_dense, export_model, merge_dense
from vit_tucker.hosts.images import input_shape
from vit_tucker.inference.evaluate import evaluation_sections, with_image_options
from vit_tucker.inference.predict import classes_for, image_options, open_model, run_config
from vit_tucker.patching.merge import Merged, MergedLayer
from vit_tucker.show.progress_bars import progress_bar
from vit_tucker.storage.paths import refuse_unwritable

FORMATS = {"onnx": "model.onnx", "torch_export": "model.pt2", "dense": "dense"}
"""Formats, and what their files are called in a run folder."""
TORCHSCRIPT = "torchscript is not written: torch has deprecated it; torch_export (.pt2) replaces it"
Tell = Callable[[Sequence[str]], None]


def export(
    where: str | Path,
    out: Path | None = None,
    format: str = "onnx",
    *,
    dense: bool = False,
    approximate: bool = False,
    data: str | None = None,
    overrides: Sequence[str] = (),
    images: int = 256,
    batch_size: int = 32,
    tolerance: float = 1e-4,
    tell: Tell | None = None,
    **file_options: Any,
) -> dict[str, Any]:
    """Exports a stored model and compares what was written with PyTorch, see ``vit_tucker.export``.

    Args:
        where: run folder, checkpoint, saved folder or OWNER/NAME of the hub, see ``open_model``.
        out: file, or folder of format dense; in the run's folder, or here, if None.
        format: "onnx", "torch_export" or "dense".
        dense: with plain attention.
        approximate: of dense: cut heads whose rank is above head_dim to the nearest that fit.
        data: images to compare on: a data set's evaluation split, an image file or folder, or "none"; the run's own if None.
        overrides: ``data.key=value`` strings.
        images, batch_size: how many of them at most, and per pass.
        tolerance: largest error over the largest logit.
        tell: called with notes about the data.
        file_options: others of ``ExportOptions``: dynamic_img_size, with_preprocessing, opset, int8, reduce_range.

    Returns:
        Plain values: file, parameter_bytes, stages, int8_products, weight_bits, layers.

    Raises:
        ExportError, ConfigError, DataError, CheckpointError: the model can't be exported as asked; nothing is written.
        MismatchError: the file does not compute what the model does.
    """
    options = read_options(format, dense, approximate, tolerance, file_options)
    out = destination(where, out, format, dense, options.int8)
    model = open_model(where)
    if options.dynamic_img_size and getattr(model, "dynamic_img_size", None) is False:
        model = open_model(where, dynamic_img_size=True)  # the same weights; timm then resamples positions as it runs
    batches = images_to_compare(model, where, data, overrides, images, batch_size, tell)
    if batches is not None:
        batches = progress_bar(batches, unit="batches")
    if format == "dense":
        folder = export_dense(model, out, approximate=approximate, batches=batches, tolerance=tolerance)
        return as_values(folder, folder.layers)
    merged = merge_dense(model, approximate=approximate) if dense else Merged(model, ())
    strict = all(layer.exact for layer in merged.layers)
    done = export_model(merged.model, out, options, batches=batches, reference=model, strict=strict)
    return as_values(done, merged.layers)


def read_options(
    format: str, dense: bool, approximate: bool, tolerance: float, file_options: dict[str, Any]
) -> ExportOptions:
    """Returns the requested options, checked before anything is loaded.

    Args:
        format, dense, approximate, tolerance, file_options: see ``export``.

    Raises:
        ExportError, ConfigError: options that can't be.
    """
    if format not in FORMATS:
        if format.lower() in ("torchscript", "jit"):
            raise ExportError(TORCHSCRIPT)
        raise ExportError(f"unknown format '{format}': one of {', '.join(FORMATS)}{nearest(format, FORMATS)}")
    if not tolerance > 0:
        raise ConfigError(f"--tolerance {tolerance}: must be above 0")
    if approximate and not (dense or format == "dense"):
        raise ExportError("--approximate is an option of --dense and of --format dense")
    if format == "dense":
        given = [name for name, value in {"dense": dense, **file_options}.items() if value not in (None, False)]
        if given:
            raise ExportError(f"--{given[0].replace('_', '-')} is no option of --format dense")
        return ExportOptions("torch_export", tolerance=tolerance)
    options = ExportOptions(format, **file_options, tolerance=tolerance)
    options.check()
    return options


def destination(where: str | Path, out: Path | None, format: str, dense: bool, int8: bool) -> Path:
    """Returns where the result is written: ``out``, else into the run's folder, else the current folder.

    Args:
        where: the model's folder or name.
        out: the user's choice, None for none.
        format: one of ``FORMATS``.
        dense, int8: forms of the exported model.

    Raises:
        ConfigError: nothing can be written there.
    """
    folder = Path(where).expanduser()
    name = FORMATS[format]
    if int8:
        name = "model.int8.onnx"
    elif dense:
        name = f"model.dense{Path(name).suffix}"
    out = out or (folder / name if folder.is_dir() else Path(name))
    is_folder = format == "dense"
    if is_folder and out.is_file():
        raise ConfigError(f"--out: {out} is a file; name a folder")
    refuse_unwritable("--out", out, folder=is_folder)
    return out


def images_to_compare(
    model: nn.Module,
    where: str | Path,
    data: str | None,
    overrides: Sequence[str],
    images: int,
    batch_size: int,
    tell: Tell | None,
) -> Iterator[Labelled] | None:
    """Returns real images, normalised for the model, with labels where they are its classes'; None for none.

    Args:
        model: opened from ``where``.
        where, data, overrides, images, batch_size, tell: see ``export``.

    Raises:
        DataError, ConfigError: they are missing, or an option is wrong.
    """
    if data == "none":
        if overrides:
            raise ConfigError(f"{overrides[0]}: there are no data with --data none")
        return None
    resolved = resolve_data_config({"input_size": input_shape(model)}, model=model)
    if data is not None and data not in INFO and Path(data).expanduser().exists():
        files = [Path(data).expanduser()]
        return begun(file_images(files, resolved, images, batch_size, image_options(model)))
    if data is None and run_config(where) is None:
        if overrides:
            raise ConfigError(f"{overrides[0]}: {where} is no run, which would bring its data set: name one by --data")
        return None
    section = with_image_options(evaluation_sections(where, data, overrides, batch_size)[0], model, overrides)
    classes, fits = None, True
    try:
        classes, notes = classes_for(model, where, section)
    except DataError as error:
        fits, notes = False, [f"{error}; compared without labels"]
    try:
        batches = begun(evaluation_images(section, resolved, images, batch_size, classes))
    except DataError as error:
        raise DataError(f"{error}; --data names other images, --data none does without") from None
    if tell is not None:
        tell(notes)
    if not is_folder_set(section.dataset):
        fits = dataset_info(section.dataset).num_classes in (None, getattr(model, "num_classes", None))
    return batches if fits else ((images, None) for images, _ in batches)


def begun(batches: Iterator[Labelled]) -> Iterator[Labelled]:
    """Returns the same batches, the first of them read already, so that an error shows before anything is exported."""
    return chain(list(islice(batches, 1)), batches)


def as_values(done: Exported | DenseFolder, layers: Sequence[MergedLayer]) -> dict[str, Any]:
    """Returns the outcome as plain values, for JSON."""
    values = {"file": str(done.path), **asdict(done), "layers": [asdict(layer) for layer in layers]}
    del values["path"]
    for stage, kept in zip(done.stages, values["stages"], strict=True):
        for name in ("random", "real"):
            comparison: Comparison | None = getattr(stage, name)
            if comparison is not None:
                derived = ("relative_error", "agreement", "accuracy_model", "accuracy_file")
                kept[name] |= {key: getattr(comparison, key) for key in derived}
    return values
