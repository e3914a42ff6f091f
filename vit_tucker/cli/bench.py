"""``bench``: throughput of models side by side, in turns in one process."""

import argparse
from pathlib import Path
from typing import Any

from vit_tucker.cli.common import PRECISIONS, add_device, add_json, add_method, choose_device, emit, positive, to_json
from vit_tucker.errors import ConfigError

EXAMPLES = """examples:
  bench vit_base_patch16_224 --method "tucker ranks=[8,16,16]" --method "gqa num_kv_heads=1" --train
  bench runs/dense runs/tucker --batch-size 64 --precision bf16 --json
"""


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "bench",
        help="throughput of models side by side",
        description="Images per second in inference and training, in turns in one process, so that noise hits all models alike; "
        "columns as of timm's benchmark script, and the speed against the first model. Weights don't matter: timm's names are "
        "built without pretrained ones, and each --method is measured in the models beside them dense.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="timm model names, run folders, saved folders")
    add_method(parser)
    parser.add_argument("--train", action="store_true", help="measure training steps too")
    parser.add_argument("--img-size", type=positive, metavar="PIXELS", help="image size, instead of each model's own")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="images per pass; 8 if left out")
    parser.add_argument(
        "--turns", type=positive, default=10, metavar="N", help="measurements of each model, in turns; 10 if left out"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="no", help="precision of autocast; no if left out")
    add_device(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write: CSV, with --json JSON")
    add_json(parser)
    parser.set_defaults(run=bench)


def bench(args: argparse.Namespace) -> int:
    """Measures the models and prints a table, or writes all columns as CSV or JSON."""
    from vit_tucker.analysis.latency import describe_device
    from vit_tucker.inference.bench import bench as bench_models
    from vit_tucker.report.bench import bench_table
    from vit_tucker.show.tables import csv_text
    from vit_tucker.storage.paths import refuse_unwritable

    if args.turns < 2:
        raise ConfigError(f"--turns {args.turns}: must be at least 2")
    if args.out is not None:
        refuse_unwritable("--out", args.out)
    device = choose_device(args.device)
    options = {name: getattr(args, name) for name in ("img_size", "batch_size", "precision", "turns")}
    rows = bench_models(args.models, args.method, device=device, training=args.train, **options)
    if args.json:
        emit(to_json(rows), args.out)
    elif args.out is not None:
        emit(csv_text(list(rows[0]), [list(row.values()) for row in rows]), args.out)
    else:
        print(bench_table(rows))
        precision, first = {"no": "float32"}.get(args.precision, args.precision), rows[0]["model"]
        print(
            f"{describe_device(device)}, {precision}, batch size {args.batch_size}; speed against {first} in the same "
            f"turn, median of {args.turns} turns (quartiles); the other times are the first model's by this speed"
        )
    return 0
