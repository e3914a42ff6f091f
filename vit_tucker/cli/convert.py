"""``convert``: a patched model from a dense one, as a folder that rebuilds itself."""

import argparse
from pathlib import Path
from typing import Any

from vit_tucker.cli.common import add_json, choose_device, emit, model_and_overrides, positive, print_notes, to_json

EXAMPLES = """examples:
  convert vit_base_patch16_224 --method "tucker ranks=[8,64,64]" --out converted model.pretrained=true
  convert vit_base_patch16_224 --method "gqa num_kv_heads=4" --out converted model.checkpoint=weights.safetensors
  convert vit_base_patch16_224 --method "tucker ranks={budget: 0.15}" --out converted \\
      --data imagenet --images 256 data.root=/data model.pretrained=true
"""


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of ``vit-tucker``."""
    from vit_tucker.cli.plan import add_target

    parser = commands.add_parser(
        "convert",
        help="convert a dense model's attention and save the result",
        description="Convert the attention of a timm model, by its weights or with images as its layers see them, and save it "
        "in timm's hub layout: vit_tucker.load and timm.create_model('local-dir:...') rebuild it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_target(parser)
    parser.add_argument(
        "--data", metavar="DATASET", help="calibrate the conversion on training images of this data set"
    )
    parser.add_argument(
        "--images", type=positive, default=256, metavar="N", help="number of images to calibrate on; 256 if left out"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    add_json(parser)
    parser.set_defaults(run=convert)


def convert(args: argparse.Namespace) -> int:
    """Converts the model, saves it and prints the report."""
    name, overrides = model_and_overrides(args, "MODEL and --cfg")
    from vit_tucker.cli.plan import report_tables
    from vit_tucker.run.built import plain_reports
    from vit_tucker.run.convert import convert as convert_model  # after it, as in plan

    options = {"data": args.data, "images": args.images, "device": choose_device(args.device, double=True)}
    done = convert_model(name, args.method, args.out, args.cfg, overrides, **options)
    print_notes(done.notes)
    if args.json:
        emit(to_json({"folder": args.out, **plain_reports(done.reports)}))
        return 0
    emit(report_tables(args, done.reports))
    hint = "" if done.trained else "; the dense model had no trained weights (model.pretrained, model.checkpoint)"
    print(f"{args.out}: saved{hint}")
    return 0
