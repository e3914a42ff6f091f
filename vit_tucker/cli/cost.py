"""``python -m vit_tucker cost``: the paper's cost tables, and what any timm model costs with any method."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_tucker.cli.common import PRECISIONS, add_device, add_json, add_method, choose_device, emit, positive
from vit_tucker.errors import ConfigError

if TYPE_CHECKING:
    from vit_tucker.analysis.costs import HostFactory, ModelCost
    from vit_tucker.attention.base import AttentionConfig
    from vit_tucker.config.schema import ModelConfig
    from vit_tucker.show.tables import Table

EXAMPLES = """examples:
  cost vit_base_patch16_224 --method "tucker ranks=[8,16,16]" --method "gqa num_kv_heads=1"
  cost vit_large_patch16_224 --method "mla q_lora_rank=32 kv_lora_rank=32" --measure --batch-size 64 --precision bf16
  cost vit_small_patch16_224 --method "tucker ranks={budget: 0.15}" model.pretrained=true model.img_size=384
  cost --cfg imagenet/tucker_r16
  cost --table 1 d=1024 H=16 N=50 r=[8,32,32]
  cost --table 2 --out table2.tex
"""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "cost",
        help="parameters, FLOPs, memory and latency of a timm model with any methods; the paper's cost tables",
        description="Parameters, FLOPs, activations, KV cache and, with --measure, latency of a timm model, dense and with "
        "attention methods; or the paper's Tables 1 to 3 by formula.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="MODEL | key=value",
        help="timm model name; config keys, e.g. model.img_size=384; with --table 1 its letters, e.g. d=1024",
    )
    add_method(parser)
    parser.add_argument("--cfg", metavar="CONFIG", help="model and method of a config, or of a run folder")
    parser.add_argument("--table", type=int, choices=(1, 2, 3), help="a table of the paper instead of a model")
    parser.add_argument(
        "--measure", action="store_true", help="also latency, in turns with the dense model, and memory"
    )
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="images per pass; 8 if left out")
    parser.add_argument(
        "--turns", type=int, default=15, metavar="N", help="of --measure, for each model; 15 if left out"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="no", help="autocast, and of the KV cache")
    add_device(parser)
    parser.add_argument(
        "--format", choices=("markdown", "csv", "latex", "json"), help="by the ending of --out, else markdown"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it there instead of printing it")
    add_json(parser)
    parser.set_defaults(run=cost)


def cost(args: argparse.Namespace) -> int:
    """The command itself."""
    from vit_tucker.report.cost import FORMATS
    from vit_tucker.storage.paths import refuse_unwritable

    by_ending = {ending: name for name, ending in FORMATS.items()}
    style = ("json" if args.json else args.format) or by_ending.get(
        "" if args.out is None else args.out.suffix, "markdown"
    )
    if args.out is not None:
        refuse_unwritable("--out", args.out)
    text = (_model(args) if args.table is None else _paper(args)).render(style)
    emit(text, args.out)
    return 0


def _paper(args: argparse.Namespace) -> "Table":
    if args.method or args.cfg or args.measure:
        raise ConfigError("--table takes no --method, --cfg or --measure: its rows are the paper's")
    if args.table == 1:
        from vit_tucker.analysis.formulas import read_sizes
        from vit_tucker.config.source import read_overrides

        return formulas(read_sizes(read_overrides(args.overrides).values))
    if args.overrides:
        raise ConfigError(f"{args.overrides[0]}: --table {args.table} takes no sizes: its model is the paper's")
    return published(args.table)


def formulas(sizes: Any) -> "Table":
    """Table 1 for some sizes, beside layers that are built."""
    from vit_tucker.analysis.formulas import TABLE_1, measure_layer
    from vit_tucker.report.cost import formula_table

    rows = []
    for row in TABLE_1:
        own = " ".join(f"{letter}={shown_number(getattr(sizes, letter))}" for letter in row.options)
        weights, entries = measure_layer(row, sizes)
        values = row.count_weights(sizes), weights, row.count_entries(sizes), entries
        rows.append((row.method, own, row.weights, row.entries, *values))
    return formula_table(f"d={sizes.d} H={sizes.H} N={sizes.N}", rows)


def shown_number(value: Any) -> str:
    """4 as '4', (8, 16, 16) as '[8,16,16]'."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def published(number: int) -> "Table":
    """Table 2 or 3."""
    from vit_tucker.analysis.published import PUBLISHED, compare_row
    from vit_tucker.report.cost import published_table

    table = PUBLISHED[number]
    dense, rows = compare_row(table, table.rows[0])[0].value, []
    for row in table.rows:
        attention, kv = compare_row(table, row)
        parts = [(str(x.rounded), x.printed, x.verdict) for x in (attention, kv)]
        rows.append((row.label, row.method, *parts[0], round(float(attention.value / dense), 4), *parts[1]))
    sizes = table.sizes
    title = f"Table {number}: {table.model} (d={sizes.d} H={sizes.H} N={sizes.N}, {table.layers} layers)"
    notes = [f"attention: {table.attention_unit}; KV cache: {table.kv_unit}"]
    return published_table(title, rows, [*notes, *(f"{row.label}: {row.note}" for row in table.rows if row.note)])


def _model(args: argparse.Namespace) -> "Table":
    from vit_tucker.analysis.costs import HostFactory, model_costs
    from vit_tucker.config.load import config_from, load_config

    names = [text for text in args.overrides if "=" not in text]
    overrides = [text for text in args.overrides if "=" in text]
    if len(names) + (args.cfg is not None) != 1:
        raise ConfigError(f"cost needs one of MODEL, --cfg and --table{f', not {len(names)} models' if names else ''}")
    if args.turns < 2:
        raise ConfigError(f"--turns {args.turns}: must be at least 2")
    methods: list[tuple[str, AttentionConfig]] = []
    if args.cfg is not None:
        from vit_tucker.run.model import classes_and_channels

        config = load_config(args.cfg, overrides)
        host = HostFactory(config.model, *classes_and_channels(config))
        if config.attention is not None:
            methods.append((str(config.name), config.attention))
    else:
        config = config_from({"model": {"name": names[0]}}, overrides)
        host = HostFactory(config.model)
    methods += [(text, read_method(text, config.model)) for text in dict.fromkeys(args.method)]
    device = choose_device(args.device) if args.measure else None
    costs = model_costs(host, methods, args.precision, args.batch_size, device, args.turns)
    return cost_table(host, costs, args)


def read_method(text: str, model: "ModelConfig") -> "AttentionConfig":
    """'tucker ranks=[8,16,16] shared_kv=true' as a config; '8,16,16' is a list too.

    Raises:
        ConfigError: unknown method or option, or a value that it can't have.
    """
    from vit_tucker.config.load import validate
    from vit_tucker.config.source import Source, read_overrides

    name, *options = re.split(r"\s+(?=[A-Za-z_][\w.]*=)", text.strip())
    if " " in name or "=" in name or not name:
        raise ConfigError(f"--method '{text}': written as 'NAME key=value ...'")
    bracketed = [re.sub(r"=(\d+(?:,\d+)+)$", r"=[\1]", option) for option in options]
    values = {"method": name, **read_overrides(bracketed).values}
    source = Source({"model": {"name": model.name}, "attention": values}, {("attention",): f"--method '{text}'"})
    attention = validate(source).attention
    assert attention is not None
    return attention


def cost_table(host: "HostFactory", costs: Sequence["ModelCost"], args: argparse.Namespace) -> "Table":
    """The table of one model."""
    from vit_tucker.report.cost import LATENCY_COLUMNS, MODEL_COLUMNS, model_table

    dense = costs[0].attention_params
    rows = []
    for entry in costs:
        share = entry.attention_params / dense if dense else None
        values = {**vars(entry), "attention": entry.label, "of_dense": share}
        keys = [column.key for column in MODEL_COLUMNS]
        if entry.latency is not None:
            values |= asdict(entry.latency)
            keys += [column.key for column in LATENCY_COLUMNS]
        rows.append([values[key] for key in keys])
    bits = {"no": "float32", "bf16": "bf16", "fp16": "fp16"}[args.precision]
    notes = [
        "per image; FLOPs: 2 per multiply-add, forward pass; attention params and FLOPs: of the self-attention layers",
        f"activations: of a training step in {bits} with batch size {args.batch_size}, divided by it, with the CPU's kernels; MB "
        f"are 10^6 bytes; KV: of all layers in {bits}",
    ]
    if (latency := costs[0].latency) is not None:
        notes.append(
            f"latency: forward pass in {bits}, batch size {args.batch_size}, on {latency.device}, {latency.threads} thread(s); "
            f"time of dense: to the dense model's in the same turn, median and quartiles of {latency.turns} turns; peak: beyond "
            "model and images"
        )
    return model_table(f"{host.config.name}: cost of attention", rows, notes)
