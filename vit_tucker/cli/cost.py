"""``python -m vit_tucker cost``: the paper's cost tables, and what any model costs with any method."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_tucker.cli.common import (
    PRECISIONS,
    add_device,
    add_json,
    add_method,
    choose_device,
    emit,
    model_and_overrides,
    positive,
)
from vit_tucker.errors import ConfigError

if TYPE_CHECKING:
    from vit_tucker.show.tables import Table

EXAMPLES = """examples:
  cost vit_base_patch16_224 --method "tucker ranks=[8,16,16]" --method "gqa num_kv_heads=1"
  cost vit_large_patch16_224 --method "mla q_lora_rank=32 kv_lora_rank=32" --measure --batch-size 64 --precision bf16
  cost vit_small_patch16_224 --method "tucker ranks={budget: 0.15}" model.pretrained=true model.img_size=384
  cost --cfg imagenet/tucker_r16
  cost hf:gpt2 --method "tucker ranks=[8,64,64]" --precision bf16
  cost --table 1 d=1024 H=16 N=50 r=[8,32,32]
  cost --table 2 --out table2.tex
"""


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "cost",
        help="parameters, FLOPs, memory and latency of a model with any methods; the paper's cost tables",
        description="Parameters, FLOPs, activations, KV cache and, with --measure, latency of a timm model, dense and with "
        "attention methods; the same but activations and latency of a language model, hf:NAME; or the paper's Tables 1 to 3 by "
        "formula.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="MODEL | key=value",
        help="timm model name, or hf:NAME of transformers; config keys, e.g. model.img_size=384; with --table 1 its letters, "
        "e.g. d=1024",
    )
    add_method(parser)
    parser.add_argument("--cfg", metavar="CONFIG", help="model and method of a config, or of a run folder")
    parser.add_argument("--table", type=int, choices=(1, 2, 3), help="print Table 1, 2 or 3 of the paper instead")
    parser.add_argument(
        "--measure", action="store_true", help="measure latency, in turns with the dense model, and memory too"
    )
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="images per pass; 8 if left out")
    parser.add_argument(
        "--turns", type=int, default=15, metavar="N", help="measurements of each model with --measure; 15 if left out"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="no",
        help="precision of autocast and of the KV cache; no if left out",
    )
    add_device(parser)
    parser.add_argument(
        "--format",
        choices=("markdown", "csv", "latex", "json"),
        help="format of the table; by the ending of --out if left out, else markdown",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write the table to, instead of printing it")
    add_json(parser)
    parser.set_defaults(run=cost)


def cost(args: argparse.Namespace) -> int:
    """Computes the table and prints or writes it."""
    from vit_tucker.report.cost import FORMATS
    from vit_tucker.storage.paths import refuse_unwritable

    by_ending = {ending: name for name, ending in FORMATS.items()}
    style = ("json" if args.json else args.format) or by_ending.get(
        "" if args.out is None else args.out.suffix, "markdown"
    )
    if args.out is not None:
        refuse_unwritable("--out", args.out)
    emit((_model(args) if args.table is None else _paper(args)).render(style), args.out)
    return 0


def _paper(args: argparse.Namespace) -> "Table":
    from vit_tucker.analysis.formulas import formula_rows, read_sizes
    from vit_tucker.analysis.published_modules import published_rows
    from vit_tucker.config.source import read_overrides
    from vit_tucker.report.cost import formula_table, published_table

    if args.method or args.cfg or args.measure:
        raise ConfigError("--table accepts no --method, --cfg or --measure: its rows are the paper's")
    if args.table == 1:
        sizes = read_sizes(read_overrides(args.overrides).values)
        return formula_table(f"d={sizes.d} H={sizes.H} N={sizes.N}", formula_rows(sizes))
    if args.overrides:
        raise ConfigError(f"{args.overrides[0]}: --table {args.table} accepts no sizes: its model is the paper's")
    return published_table(*published_rows(args.table))


def _model(args: argparse.Namespace) -> "Table":
    name, overrides = model_and_overrides(args, "MODEL, --cfg and --table")
    from vit_tucker.report.cost import model_table
    from vit_tucker.run.costs import costs  # after it, as in plan

    if args.turns < 2:
        raise ConfigError(f"--turns {args.turns}: must be at least 2")
    device = choose_device(args.device) if args.measure else None
    options = {"precision": args.precision, "batch_size": args.batch_size}
    model, found = costs(name, args.method, args.cfg, overrides, device=device, turns=args.turns, **options)
    return model_table(model, [entry.to_dict() for entry in found], **options)
