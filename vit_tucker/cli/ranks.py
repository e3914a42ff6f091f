"""``ranks``: the ranks that a model's attention really has."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_tucker.cli.common import MODEL_HELP, add_device, add_json, choose_device, emit, positive, print_notes, to_json
from vit_tucker.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from vit_tucker.attention.options import Calibration

EXAMPLES = """examples:
  ranks vit_small_patch16_224 --gqa 2,1 --mla 96
  ranks vit_small_patch16_224 --data imagenet data.root=/data
  ranks runs/digits-tucker_r16-0 --out spectra
"""


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "ranks",
        help="measure the ranks of a model's attention: CSV files and a figure",
        description="Singular values and ranks of the pre- and post-softmax tensors of each attention layer, mode by mode: of a "
        "timm model, or of a stored one, dense or with a method's layers, whose tensors are what these compute with.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL | RUN", help=f"timm model name; {MODEL_HELP}")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint", metavar="FILE", help="weights of a dense model, or a run folder; timm's own if left out"
    )
    weights.add_argument(
        "--random", action="store_true", help="analyse timm's initialisation instead of trained weights"
    )
    parser.add_argument(
        "--data",
        metavar="DATASET",
        help="analyse the tensors whitened by tokens of this data set's training images too",
    )
    parser.add_argument(
        "--images", type=positive, default=256, metavar="N", help="number of images for that; 256 if left out"
    )
    parser.add_argument(
        "--gqa", type=_numbers, metavar="G,...", help="numbers of key/value heads whose rank limits the figure marks"
    )
    parser.add_argument(
        "--mla", type=_numbers, metavar="C,...", help="latent widths whose rank limits the figure marks"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder to write; runs/ranks-MODEL if left out")
    add_device(parser)
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
    from vit_tucker.storage.paths import refuse_unwritable

    named = args.model.strip("./~").replace("/", "_").replace(":", "_")
    folder = args.out or Path("runs") / f"ranks-{named}"
    refuse_unwritable("--out", folder, folder=True)
    options = Calibration(images=args.images)
    device = choose_device(args.device, double=True)
    model, batches, notes = open_analysed(args, options)
    found = analyse(model.to(device), batches, options)
    save_spectra(folder, found.rows, found.shapes)
    print_notes([*notes, *found.notes])
    kinds = sorted({row.whitened for row in found.rows})
    files = [draw_spectra(folder, whitened, args.gqa, args.mla) for whitened in kinds]
    if args.json:
        emit(to_json({"folder": folder, "figures": files, "ranks": rank_rows(folder)}))
        return 0
    print(rank_summary(folder))
    print(
        f"means over layers (smallest-largest); {folder}/ranks.csv, singular_values.csv, {', '.join(f.name for f in files)}"
    )
    return 0


def open_analysed(
    args: argparse.Namespace, options: "Calibration"
) -> tuple["nn.Module", "Iterator[Tensor] | None", list[str]]:
    """Returns the model that is named, batches of images where there are to be some, and lines about its weights."""
    from vit_tucker.inference.spectra import is_stored, stored_model
    from vit_tucker.run.model import analysed_model

    if not is_stored(args.model):
        given = (args.checkpoint, args.random, args.data, options, args.overrides)
        model, batches, report = analysed_model(args.model, *given)
        return model, batches, [] if report is None else [str(report)]
    if args.checkpoint is not None or args.random:
        flag = "--random" if args.random else "--checkpoint"
        raise ConfigError(f"{flag} is for timm model names; {args.model} has weights of its own")
    return *stored_model(args.model, args.data, options, args.overrides), []
