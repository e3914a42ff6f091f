"""How fast are our attention layers? Forward and training step against timm's dense Attention and other peers, in turns.

    python benchmarks/attention.py --save benchmarks/results/attention_cpu [--shapes 8x197x768x12 ...] [--precision bf16]

A shape is batch x tokens x embed_dim x num_heads. Everything runs in one process, one after the other, many times; a speed-up is
the dense layer's time over a layer's own in the same turn, median over turns, with quartiles. The promise is the ratio of their
operations. The floor is what products, exponentials and memory would take at this machine's measured rates (roofline.py); a share
of 0.5 means that the layer takes twice that. A training step is a forward and a backward pass, with the gradient of the input.
Columns of the CSV have timm's names where timm has such a column. Exit status: 0 measured, 2 bad arguments.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from attention_layers import Layer, Shape, layers_of, parse_shape, rotated_layers
from output import device_parser, save_tables, start
from pictures import draw_promise
from roofline import Machine, floor_ms
from turns import Timing, in_turns, inference, peak_megabytes, training

import vit_tucker as vt
from vit_tucker.errors import VitTuckerError, one_line
from vit_tucker.show.tables import markdown

SHAPES = ("8x197x768x12", "8x65x384x6", "8x197x1024x16")
RANKS = (16, 32, 64, 128)
COLUMNS = (
    *("shape", "layer", "backend", "precision", "param_count"),
    *("infer_batch_size", "infer_samples_per_sec", "infer_step_time", "infer_gmacs"),
    *("train_batch_size", "train_samples_per_sec", "train_step_time", "train_peak_mb", "promise"),
    *("infer_speedup", "infer_speedup_25", "infer_speedup_75", "train_speedup", "train_speedup_25", "train_speedup_75"),
    *("infer_floor_products", "infer_floor_exps", "infer_floor_memory", "infer_share"),
    *("train_floor_products", "train_floor_exps", "train_floor_memory", "train_share"),
)


def measure(shape: Shape, args: argparse.Namespace, machine: Machine) -> list[dict[str, Any]]:
    """Rows of one shape."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    ranks = [r for r in args.ranks if r <= shape.dim]
    layers = rotated_layers(shape, ranks) if args.rope else layers_of(shape, ranks, args.backends, not args.no_peers)
    x = torch.randn(shape.batch, shape.tokens, shape.dim, device=device)
    modules = {}
    for name, layer in layers.items():
        try:
            module = layer.build().to(device)
            if args.compile:
                module.compile()
            training(module, x, args.precision)()
            modules[name] = module
        except (VitTuckerError, ImportError, torch.OutOfMemoryError) as error:
            print(f"{shape} {name}: left out: {one_line(error)}", flush=True)
    timings = {
        kind: in_turns({n: call(m, x, args.precision) for n, m in modules.items()}, device, args.turns, args.seconds)
        for kind, call in (("infer", inference), ("train", training))
    }
    rows = []
    for name, module in modules.items():
        row = {"shape": str(shape), "layer": name, "precision": args.precision, "backend": layers[name].backend or "auto",
               "param_count": sum(p.numel() for p in module.parameters()) / 1e6}  # fmt: skip
        for kind, timing in timings.items():
            row |= timing_columns(kind, shape, timing[name])
        if layers[name].config is not None:
            row |= operation_columns(layers[name], shape, machine, args.precision, row)
        row["train_peak_mb"] = peak_megabytes(training(module, x, args.precision), module, x)
        rows.append(row)
    return rows


def timing_columns(kind: str, shape: Shape, timing: Timing) -> dict[str, Any]:
    """Columns of a forward pass ("infer") or a training step ("train")."""
    return {
        f"{kind}_batch_size": shape.batch,
        f"{kind}_samples_per_sec": 1e3 * shape.batch / timing.ms,
        f"{kind}_step_time": timing.ms,
        f"{kind}_speedup": timing.speedup,
        f"{kind}_speedup_25": timing.low,
        f"{kind}_speedup_75": timing.high,
    }


def operation_columns(
    layer: Layer, shape: Shape, machine: Machine, precision: str, row: dict[str, Any]
) -> dict[str, Any]:
    """What the operations promise, and how near the measured times come to the machine's rates."""
    config, spec = layer.config, layer.spec or shape.spec
    assert config is not None
    flops, dense_flops = (c.count_flops(spec, shape.tokens) for c in (config, vt.MHAConfig()))
    columns = {"infer_gmacs": flops / 2e9, "promise": dense_flops / flops}
    for kind in ("infer", "train"):
        floor = floor_ms(config, spec, shape.batch, shape.tokens, machine, precision, kind == "train")
        columns[f"{kind}_share"] = sum(floor) / row[f"{kind}_step_time"]
        columns |= {f"{kind}_floor_{part}": ms for part, ms in zip(("products", "exps", "memory"), floor, strict=True)}
    return columns


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown for people."""
    header = ("layer", "parameters k", "forward ms", "step ms", "promise", "forward speed-up", "step speed-up", "share of floor",
              "step's peak MB")  # fmt: skip
    text = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        cells = []
        for row in (row for row in rows if row["shape"] == shape):
            speedups = [f"{row[f'{kind}_speedup']:.2f} [{row[f'{kind}_speedup_25']:.2f}, {row[f'{kind}_speedup_75']:.2f}]"
                        for kind in ("infer", "train")]  # fmt: skip
            promise = f"{row['promise']:.1f}" if "promise" in row else ""
            share = f"{row['infer_share']:.2f} / {row['train_share']:.2f}" if "infer_share" in row else ""
            cells.append([row["layer"], f"{row['param_count'] * 1e3:.0f}", f"{row['infer_step_time']:.2f}",
                          f"{row['train_step_time']:.2f}", promise, *speedups, share, f"{row['train_peak_mb']:.1f}"])  # fmt: skip
        text += [f"### {shape}", "", markdown(header, cells), ""]
    return "\n".join(text)


def main() -> int:
    """See the module."""
    parser = device_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=[parse_shape(text) for text in SHAPES])
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS), help="query/output and key/value ranks")
    parser.add_argument("--backends", nargs="*", default=[], help="of our layers, each for itself; none: auto")
    parser.add_argument("--no-peers", action="store_true", help="dense and Tucker only")
    parser.add_argument(
        "--rope", action="store_true", help="with RoPE, against timm's AttentionRope; no backends by name"
    )
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="attention.csv, attention.md, promise.png")
    args = parser.parse_args()
    if args.rope and args.backends:
        parser.error("--rope measures the backend that auto chooses: leave --backends out")
    try:
        machine = start(args, args.backends)
    except VitTuckerError as error:
        parser.error(str(error))
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        rows += measure(shape, args, machine)
        print(table([row for row in rows if row["shape"] == str(shape)]), flush=True)
    save_tables(args, "attention", COLUMNS, rows, table(rows), machine)
    if args.save is not None:
        draw_promise(rows, args.save / "promise.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
