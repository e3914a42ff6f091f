"""``bench``: throughput of models side by side, in turns in one process."""

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_tucker.cli.common import PRECISIONS, add_device, add_json, add_method, choose_device, emit, positive, to_json
from vit_tucker.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

EXAMPLES = """examples:
  bench vit_base_patch16_224 --method "tucker ranks=[8,16,16]" --method "gqa num_kv_heads=1" --train
  bench runs/dense runs/tucker --batch-size 64 --precision bf16 --json
"""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``vit-tucker``."""
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
    parser.add_argument("--train", action="store_true", help="also training steps")
    parser.add_argument("--img-size", type=positive, metavar="PIXELS", help="in place of the models' own size")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="images per pass; 8 if left out")
    parser.add_argument("--turns", type=positive, default=10, metavar="N", help="for each model; 10 if left out")
    parser.add_argument("--precision", choices=PRECISIONS, default="no", help="autocast")
    add_device(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a CSV file, with --json a JSON file")
    add_json(parser)
    parser.set_defaults(run=bench)


def bench(args: argparse.Namespace) -> int:
    """The command itself."""
    from vit_tucker.analysis.bench import bench_models
    from vit_tucker.analysis.latency import describe_device
    from vit_tucker.hosts.images import input_shape
    from vit_tucker.storage.paths import refuse_unwritable

    if args.turns < 2:
        raise ConfigError(f"--turns {args.turns}: must be at least 2")
    if args.out is not None:
        refuse_unwritable("--out", args.out)
    device = choose_device(args.device)
    models = build(args)
    sizes = {name: input_shape(model, args.img_size) for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {'x'.join(map(str, size))}" for name, size in sizes.items())
        raise ConfigError(f"the models take different images ({listed}); give --img-size, or compare them one by one")
    size = next(iter(sizes.values()))
    rows = bench_models(models, size, args.batch_size, device, args.precision, args.turns, training=args.train)
    if args.json:
        emit(to_json(rows), args.out)
    elif args.out is not None:
        emit(as_csv(rows), args.out)
    else:
        print(as_table(rows))
        precision, first = {"no": "float32"}.get(args.precision, args.precision), rows[0]["model"]
        print(
            f"{describe_device(device)}, {precision}, batch size {args.batch_size}; speed against {first} in the same "
            f"turn, median of {args.turns} turns (quartiles); the other times are the first model's by this speed"
        )
    return 0


def build(args: argparse.Namespace) -> dict[str, "nn.Module"]:
    """The models by name: as stored, or made by timm, dense and with each method."""
    from vit_tucker.analysis.costs import patched
    from vit_tucker.checkpoint.host_model import create_host
    from vit_tucker.cli.cost import read_method
    from vit_tucker.config.schema import ModelConfig
    from vit_tucker.inference.predict import open_model

    found: dict[str, nn.Module] = {}
    for name in dict.fromkeys(args.models):
        if Path(name).exists() or "/" in name:
            overrides = {} if args.img_size is None else {"img_size": args.img_size}
            found[name] = open_model(name, **overrides)
            continue
        config = ModelConfig(name=name, img_size=args.img_size)
        found[name] = create_host(config)
        for text in dict.fromkeys(args.method):
            method = read_method(text, config).unconverted()
            found[f"{name} {text}"] = patched(create_host(config), text, method, None)
    if args.method and not any(name.partition(" ")[2] for name in found):
        raise ConfigError("--method is for timm model names; stored models have their attention already")
    return found


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """All columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """The main columns, in Markdown."""
    from vit_tucker.show.tables import markdown

    kinds = [kind for kind in ("infer", "train") if f"{kind}_step_time" in rows[0]]
    header = ["model", "params M", "attention params", "GMACs"]
    for kind in kinds:
        header += [f"{kind} images/s", f"{kind} ms", f"{kind} speed"]
    cells = []
    for row in rows:
        gmacs = "-" if row["infer_gmacs"] is None else f"{row['infer_gmacs']:.3f}"
        line = [row["model"], f"{row['param_count']:.2f}", f"{row['attention_params']:,}", gmacs]
        for kind in kinds:
            speed = "{:.2f}x ({:.2f}-{:.2f})".format(*(row[f"{kind}_speedup{end}"] for end in ("", "_low", "_high")))
            line += [f"{row[f'{kind}_samples_per_sec']:,.1f}", f"{row[f'{kind}_step_time']:.2f}", speed]
        cells.append(line)
    return markdown(header, cells, 1)
