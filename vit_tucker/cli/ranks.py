"""``ranks``: the ranks that a model's attention really has."""

import argparse
from pathlib import Path
from typing import Any

from vit_tucker.cli.common import add_json, emit, positive, print_notes, to_json


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "ranks",
        help="the ranks that a model's attention really has: CSV files and a figure",
        description="Singular values and ranks of the pre- and post-softmax tensors of each attention layer, mode by mode.",
    )
    parser.add_argument("model", metavar="MODEL", help="timm model name")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint", metavar="FILE", help="weights of a dense model, or a run folder; timm's own if left out"
    )
    weights.add_argument("--random", action="store_true", help="timm's initialisation instead of trained weights")
    parser.add_argument(
        "--data", metavar="DATASET", help="also whitened by the tokens of training images of this data set"
    )
    parser.add_argument("--images", type=positive, default=256, metavar="N", help="how many of them; 256 if left out")
    parser.add_argument(
        "--gqa", type=_numbers, metavar="G,...", help="key/value heads whose reach is marked in the figure"
    )
    parser.add_argument(
        "--mla", type=_numbers, metavar="C,...", help="latent widths whose reach is marked in the figure"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to; runs/ranks-MODEL if left out")
    add_json(parser)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config keys, e.g. model.img_size=224")
    parser.set_defaults(run=ranks)


def _numbers(text: str) -> tuple[int, ...]:
    """Reads '4,2' as (4, 2)."""
    return tuple(int(part) for part in text.split(","))


def ranks(args: argparse.Namespace) -> int:
    """Analyses the model, writes tables and figures, and prints the ranks."""
    from vit_tucker.analysis.spectra import analyse, save_spectra
    from vit_tucker.attention.options import Calibration
    from vit_tucker.report.spectra import draw_spectra, rank_rows, rank_summary
    from vit_tucker.run.model import analysed_model
    from vit_tucker.storage.paths import refuse_unwritable

    folder = args.out or Path("runs") / f"ranks-{args.model.replace('/', '_').replace(':', '_')}"
    refuse_unwritable("--out", folder, folder=True)
    options = Calibration(images=args.images)
    model, batches, report = analysed_model(
        args.model, args.checkpoint, args.random, args.data, options, args.overrides
    )
    found = analyse(model, batches, options)
    save_spectra(folder, found.rows, found.shapes)
    print_notes([*([] if report is None else [str(report)]), *found.notes])
    files = [
        draw_spectra(folder, whitened, args.gqa, args.mla) for whitened in ([False, True] if args.data else [False])
    ]
    if args.json:
        emit(to_json({"folder": folder, "figures": files, "ranks": rank_rows(folder)}))
        return 0
    print(rank_summary(folder))
    print(
        f"means over layers (smallest-largest); {folder}/ranks.csv, singular_values.csv, {', '.join(f.name for f in files)}"
    )
    return 0
