"""``convert``: a patched model from a dense one, as a folder that rebuilds itself."""

import argparse
import sys
from pathlib import Path
from typing import Any

from vit_tucker.cli.common import add_json, emit, positive, print_notes, to_json

EXAMPLES = """examples:
  convert vit_base_patch16_224 --method "tucker ranks=[8,64,64]" --out converted model.pretrained=true
  convert vit_base_patch16_224 --method "gqa num_kv_heads=4" --out converted model.checkpoint=weights.safetensors
  convert vit_base_patch16_224 --method "tucker ranks={budget: 0.15}" --out converted \\
      --data imagenet --images 256 data.root=/data model.pretrained=true
"""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``vit-tucker``."""
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
    parser.add_argument("--images", type=positive, default=256, metavar="N", help="how many of them; 256 if left out")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to")
    add_json(parser)
    parser.set_defaults(run=convert)


def convert(args: argparse.Namespace) -> int:
    """The command itself."""
    from vit_tucker.attention.options import Calibration
    from vit_tucker.checkpoint.describe import set_image_options
    from vit_tucker.checkpoint.save import save
    from vit_tucker.cli.plan import create, read_target
    from vit_tucker.data.datasets import dataset_info
    from vit_tucker.data.image_files import ImageOptions
    from vit_tucker.data.samples import calibration_images
    from vit_tucker.data.transforms import resolve_data
    from vit_tucker.hosts.images import input_shape
    from vit_tucker.patching.patch import patch
    from vit_tucker.run.model import plain_reports
    from vit_tucker.storage.paths import refuse_unwritable
    from vit_tucker.training.lock import RunLock

    if args.data is not None:
        args.overrides.append(f"data.dataset={args.data}")
    config, attention = read_target(args)
    refuse_unwritable("--out", args.out, folder=True)
    lock = RunLock(args.out, "--out")
    lock.refuse_held()
    if args.data is not None and attention is not None:
        dataset_info(args.data)
        options = attention.calibration or Calibration(images=args.images)
        attention = attention.model_copy(update={"calibration": options})
    model, weights = create(config)
    model.eval()
    size = input_shape(model, config.model.img_size)
    trained = config.model.is_trained
    data = resolve_data(config.data, dataset_info(config.data.dataset), model, trained, size)
    images = None
    calibration = None if attention is None else attention.calibration
    if calibration is not None:
        images = calibration_images(config.data, data, calibration.images, calibration.batch_size, calibration.seed)
        if sys.stderr.isatty():
            print(f"converting on {calibration.images} images of {config.data.dataset} ...", file=sys.stderr)
    reports = [
        patch(
            model,
            method,
            calibration=images if method.fitted_to else None,
            keep_originals=False,
            img_size=config.model.img_size,
        )
        for method in (attention, config.linear)
        if method is not None
    ]
    set_image_options(model, ImageOptions.of(config.data).plain())
    lock.take()
    try:
        save(model, args.out, data=data)
    finally:
        lock.release()
    print_notes(weights)
    if args.json:
        emit(to_json({"folder": args.out, **plain_reports(reports)}))
        return 0
    emit("\n\n".join(map(str, reports)))
    hint = "" if trained else "; the dense model had no trained weights (model.pretrained, model.checkpoint)"
    print(f"{args.out}: saved{hint}")
    return 0
