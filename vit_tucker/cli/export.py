"""``export``: a stored model as a file for other runtimes, checked before it gets its name."""

import argparse
from pathlib import Path
from typing import Any

from vit_tucker.cli.common import MODEL_HELP, OVERRIDES_HELP, add_json, emit, positive, print_notes, to_json

OPTIONS = (
    *("dense", "approximate", "dynamic_img_size", "with_preprocessing", "opset", "int8", "reduce_range"),
    *("data", "images", "batch_size", "tolerance", "overrides"),
)
"""Arguments that ``vit_tucker.inference.export.export`` has under the same names."""
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
    """Adds the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "export",
        help="export a trained model as ONNX, torch.export or plain timm, checked against PyTorch",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="RUN", help=MODEL_HELP)
    parser.add_argument(
        "--format",
        default="onnx",
        metavar="FORMAT",
        help="format of the file: onnx (if left out), torch_export or dense",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="file or folder to write; in RUN if left out, or here for a model of the hub",
    )
    parser.add_argument(
        "--dense",
        action="store_true",
        help="convert attention to plain attention of equal outputs (onnx, torch_export)",
    )
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="for dense: truncate heads whose rank is above head_dim to the nearest that fit",
    )
    parser.add_argument("--dynamic-img-size", action="store_true", help="accept images of any size, if the model does")
    parser.add_argument(
        "--with-preprocessing", action="store_true", help="accept images in [0, 1] and normalise them in the file"
    )
    parser.add_argument("--opset", type=int, metavar="N", help="ONNX operator set; the exporter's default if left out")
    parser.add_argument(
        "--int8", action="store_true", help="quantise the products with weights (onnx), and report what that costs"
    )
    parser.add_argument(
        "--reduce-range",
        action=argparse.BooleanOptionalAction,
        help="for int8: 7-bit weights, for x86 CPUs without VNNI; by this machine's CPU if left out",
    )
    parser.add_argument(
        "--data",
        metavar="WHAT",
        help="images to compare on: a data set's evaluation split, an image file or folder, or none; the run's own if left out",
    )
    parser.add_argument(
        "--images", type=positive, default=256, metavar="N", help="most images to compare on; 256 if left out"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="images per pass of the comparison; 32 if left out"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="largest allowed error, relative to the largest logit; 1e-4 if left out",
    )
    add_json(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="data.key=value", help=f"{OVERRIDES_HELP}, e.g. data.root=/data"
    )
    parser.set_defaults(run=export)


def export(args: argparse.Namespace) -> int:
    """Exports the model and prints how the file compares with it."""
    from vit_tucker.inference.export import export as export_stored
    from vit_tucker.report.export import export_text

    options = {key: value for key, value in vars(args).items() if key in OPTIONS}
    values = export_stored(args.model, args.out, args.format, tell=print_notes, **options)
    emit(to_json(values) if args.json else export_text(values))
    return 0
