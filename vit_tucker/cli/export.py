"""``export``: a stored model as a file for other runtimes, checked before it gets its name."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_tucker.cli.common import MODEL_HELP, OVERRIDES_HELP, add_json, emit, positive, print_notes, to_json
from vit_tucker.errors import ConfigError, DataError, ExportError, nearest

if TYPE_CHECKING:
    from torch import nn

    from vit_tucker.data.samples import Labelled
    from vit_tucker.export import Comparison, DenseFolder, Exported, ExportOptions
    from vit_tucker.patching.merge import MergedLayer

FORMATS = {"onnx": "model.onnx", "torch_export": "model.pt2", "dense": "dense"}
"""Formats, and what their files are called in a run folder."""
TORCHSCRIPT = "torchscript is not written: torch has deprecated it; torch_export (.pt2) is what takes its place"
DESCRIPTION = """Write a trained model, patched or dense, for other runtimes, and compare what was written with PyTorch: on noise,
with other numbers of images than it was recorded with, and on real images. A file that differs gets no name (exit status 1).

formats:
  onnx          one file with its weights (beyond 2 GB beside it) for onnxruntime and others: 'image' (batch, channels, height,
                width) -> 'logits'; normalisation, input size and class names are in its metadata
  torch_export  torch's own .pt2: torch.export.load, C++, AOTInductor
  dense         a folder with plain attention, for tools that know timm but not vit_tucker:
                timm.create_model("local-dir:FOLDER", pretrained=True)
TorchScript is not supported: torch has deprecated it, and torch_export takes its place."""
EXAMPLES = """examples:
  export runs/digits-tucker_r16-0
  export runs/my_run --int8 --with-preprocessing --out model.onnx
  export runs/my_run --format torch_export --data photos/
  export runs/my_run --format dense --approximate
  export owner/name --data imagenet data.root=/data --images 1000
"""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "export",
        help="a trained model as ONNX, torch.export or plain timm, checked against PyTorch",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="RUN", help=MODEL_HELP)
    parser.add_argument("--format", default="onnx", metavar="FORMAT", help="onnx (if left out), torch_export or dense")
    parser.add_argument("--out", type=Path, metavar="PATH", help="where to; in RUN, or here for a model of the hub")
    parser.add_argument(
        "--dense", action="store_true", help="with plain attention, equal to the model's (onnx, torch_export)"
    )
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="of dense: cut heads whose rank is above head_dim to the nearest that fit",
    )
    parser.add_argument(
        "--dynamic-img-size", action="store_true", help="images of any size, where the model takes them"
    )
    parser.add_argument(
        "--with-preprocessing", action="store_true", help="take images in [0, 1] and normalise them in the file"
    )
    parser.add_argument("--opset", type=int, metavar="N", help="of ONNX; the exporter's own if left out")
    parser.add_argument(
        "--int8", action="store_true", help="quantise the products with weights (onnx), and tell what that costs"
    )
    parser.add_argument(
        "--reduce-range",
        action=argparse.BooleanOptionalAction,
        help="of int8: 7-bit weights, for x86 CPUs without VNNI; where this machine needs them if left out",
    )
    parser.add_argument(
        "--data",
        metavar="WHAT",
        help="images to compare on: a data set's evaluation split, an image file or folder, or none; the run's own if left out",
    )
    parser.add_argument(
        "--images", type=positive, default=256, metavar="N", help="how many of them at most; 256 if left out"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="of the comparison; 32 if left out"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="largest error over the largest logit; 1e-4 if left out",
    )
    add_json(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="data.key=value", help=f"{OVERRIDES_HELP}, e.g. data.root=/data"
    )
    parser.set_defaults(run=export)


def export(args: argparse.Namespace) -> int:
    """The command itself."""
    from tqdm import tqdm

    from vit_tucker.export import export_dense, export_model, merge_dense
    from vit_tucker.inference.predict import open_model
    from vit_tucker.patching.merge import Merged
    from vit_tucker.report.export import export_text

    options = read_options(args)
    out = destination(args)
    model = open_model(args.model)
    if args.dynamic_img_size and getattr(model, "dynamic_img_size", None) is False:
        model = open_model(
            args.model, dynamic_img_size=True
        )  # the same weights; timm then resamples positions as it runs
    batches = images_to_compare(args, model)
    if batches is not None:
        batches = tqdm(batches, unit="batches", disable=None, leave=False)
    if args.format == "dense":
        folder = export_dense(model, out, approximate=args.approximate, batches=batches, tolerance=options.tolerance)
        values = as_values(folder, folder.layers)
    else:
        merged = merge_dense(model, approximate=args.approximate) if args.dense else Merged(model, ())
        strict = all(layer.exact for layer in merged.layers)
        done = export_model(merged.model, out, options, batches=batches, reference=model, strict=strict)
        values = as_values(done, merged.layers)
    emit(to_json(values) if args.json else export_text(values))
    return 0


def read_options(args: argparse.Namespace) -> "ExportOptions":
    """What is asked for, checked before anything is loaded.

    Raises:
        ExportError, ConfigError: options that can't be.
    """
    from vit_tucker.export import ExportOptions

    if args.format not in FORMATS:
        if args.format.lower() in ("torchscript", "jit"):
            raise ExportError(TORCHSCRIPT)
        raise ExportError(f"unknown format '{args.format}': one of {', '.join(FORMATS)}{nearest(args.format, FORMATS)}")
    if not args.tolerance > 0:
        raise ConfigError(f"--tolerance {args.tolerance}: must be above 0")
    if args.approximate and not (args.dense or args.format == "dense"):
        raise ExportError("--approximate is an option of --dense and of --format dense")
    file_only = ("dynamic_img_size", "with_preprocessing", "opset", "int8", "reduce_range")
    if args.format == "dense":
        given = [name for name in ("dense", *file_only) if getattr(args, name) not in (None, False)]
        if given:
            raise ExportError(f"--{given[0].replace('_', '-')} is no option of --format dense")
        return ExportOptions("torch_export", tolerance=args.tolerance)
    options = ExportOptions(args.format, **{name: getattr(args, name) for name in file_only}, tolerance=args.tolerance)
    options.check()
    return options


def destination(args: argparse.Namespace) -> Path:
    """Where the result goes: ``--out``, else into the run's folder, else here.

    Raises:
        ConfigError: nothing can be written there.
    """
    from vit_tucker.storage.paths import refuse_unwritable

    folder = Path(args.model).expanduser()
    name = FORMATS[args.format]
    if args.int8:
        name = "model.int8.onnx"
    elif args.dense:
        name = f"model.dense{Path(name).suffix}"
    out: Path = args.out or (folder / name if folder.is_dir() else Path(name))
    is_folder = args.format == "dense"
    if is_folder and out.is_file():
        raise ConfigError(f"--out: {out} is a file; name a folder")
    refuse_unwritable("--out", out, folder=is_folder)
    return out


def images_to_compare(args: argparse.Namespace, model: "nn.Module") -> "Iterator[Labelled] | None":
    """Real images, normalised for the model, with labels where they are its classes'; None for none.

    Raises:
        DataError, ConfigError: they are missing, or an option is wrong.
    """
    from timm.data import resolve_data_config

    from vit_tucker.cli.evaluate import data_config, with_image_options
    from vit_tucker.data.datasets import INFO, dataset_info
    from vit_tucker.data.folders import is_folder_set
    from vit_tucker.data.samples import evaluation_images, file_images
    from vit_tucker.hosts.images import input_shape
    from vit_tucker.inference.predict import classes_for, image_options, run_config

    if args.data == "none":
        if args.overrides:
            raise ConfigError(f"{args.overrides[0]}: there are no data with --data none")
        return None
    resolved = resolve_data_config({"input_size": input_shape(model)}, model=model)
    if args.data is not None and args.data not in INFO and Path(args.data).expanduser().exists():
        files = [Path(args.data).expanduser()]
        return begun(file_images(files, resolved, args.images, args.batch_size, image_options(model)))
    if args.data is None and run_config(args.model) is None:
        if args.overrides:
            raise ConfigError(
                f"{args.overrides[0]}: {args.model} is no run, which would bring its data set: name one by --data"
            )
        return None
    config = data_config(argparse.Namespace(**{**vars(args), "precision": "no", "cpu": True})).data
    config = with_image_options(config, model, args)
    classes, fits = None, True
    try:
        classes, notes = classes_for(model, args.model, config)
    except DataError as error:
        fits, notes = False, [f"{error}; compared without labels"]
    try:
        batches = begun(evaluation_images(config, resolved, args.images, args.batch_size, classes))
    except DataError as error:
        raise DataError(f"{error}; --data names other images, --data none does without") from None
    print_notes(notes)
    if not is_folder_set(config.dataset):
        fits = dataset_info(config.dataset).num_classes in (None, getattr(model, "num_classes", None))
    return batches if fits else ((images, None) for images, _ in batches)


def begun(batches: "Iterator[Labelled]") -> "Iterator[Labelled]":
    """The same batches; what is wrong with the first shows now, before anything is exported."""
    return chain(list(islice(batches, 1)), batches)


def as_values(done: "Exported | DenseFolder", layers: "Sequence[MergedLayer]") -> dict[str, Any]:
    """The outcome as JSON has it."""
    values = {"file": str(done.path), **asdict(done), "layers": [asdict(layer) for layer in layers]}
    del values["path"]
    for stage, kept in zip(done.stages, values["stages"], strict=True):
        for name in ("random", "real"):
            comparison: Comparison | None = getattr(stage, name)
            if comparison is not None:
                derived = ("relative_error", "agreement", "accuracy_model", "accuracy_file")
                kept[name] |= {key: getattr(comparison, key) for key in derived}
    return values
