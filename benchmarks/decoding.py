"""What does a latent cache gain in decoding? Against transformers' dense attention, absorbed MLA, and MLA that re-expands.

    python benchmarks/decoding.py --threads 1 --save benchmarks/results/decoding [--parts attention layer step compiled prefill]

Shapes are those of GPT-2 and LLaMA-3.2-1B, weights random. Parts:

    attention   one token against cached ones, without projections, also in other dense forms than transformers' own
    layer       one attention layer with its projections, on a static cache
    step        a model of --layers blocks, on a static and on a dynamic cache
    compiled    the same on a static cache under torch.compile(fullgraph=True)
    prefill     a prompt of 1,024 tokens in one attention layer

A speed-up is the dense time over a form's own in the same turn, median over turns, with quartiles, all in one process. Cached
megabytes are counted from the cache's tensors, peak megabytes are what a step makes beside weights and cache. MLA that re-expands
runs at batch 1 only. Exit status: 0 measured, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from decoding_forms import SHAPES, Call, Shape, attention_calls
from decoding_models import layer_step_of, models_of, prefill_of, step_of
from output import device_parser, rounded, save_tables, start
from pictures import draw_decoding
from turns import DTYPES, in_turns

from vit_tucker.analysis.interleaved import peak_bytes
from vit_tucker.errors import VitTuckerError
from vit_tucker.show.tables import markdown

PARTS = ("attention", "layer", "step", "compiled", "prefill")
COLUMNS = ("part", "shape", "precision", "cache", "batch", "tokens", "form", "ms", "tokens_per_s", "speedup", "speedup_25",
           "speedup_75", "cache_mb", "peak_mb")  # fmt: skip
HEAD_RANK, QUERY_RANK, PREFILL, PREFILL_RANKS = 8, 128, 1024, (64, 192, 512)
CPU = torch.device("cpu")


def timed(calls: dict[str, Call], args: argparse.Namespace, **facts: Any) -> list[dict[str, Any]]:
    """Rows of calls against the first of them; ``facts`` are the columns that all have."""
    if facts["batch"] > 1:
        calls = {name: call for name, call in calls.items() if "re-expanding" not in name}
    timings = in_turns(calls, CPU, args.turns, args.seconds)
    rows = []
    for name, timing in timings.items():
        quartiles = {"speedup": timing.speedup, "speedup_25": timing.low, "speedup_75": timing.high}
        rate = 1e3 * facts["batch"] / timing.ms
        rows.append({**facts, "form": name, "ms": timing.ms, "tokens_per_s": rate, **quartiles})
    print(table(rows), flush=True)
    return rows


def settings(args: argparse.Namespace) -> Iterator[tuple[Shape, str, torch.dtype]]:
    """Yields shapes and precisions."""
    for shape, precision in itertools.product(args.shapes, args.precisions):
        yield SHAPES[shape], precision, DTYPES[precision]


def attention(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of the attention part alone."""
    for (shape, precision, dtype), batch, cached in itertools.product(settings(args), args.batches, args.cached):
        calls = attention_calls(shape, batch, cached, args.ranks, dtype)
        facts = {"part": "attention", "shape": shape.name, "precision": precision, "cache": "static"}
        with torch.no_grad():
            yield from timed(calls, args, **facts, batch=batch, tokens=cached)


def layer(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of one attention layer with its projections."""
    for shape, precision, dtype in settings(args):
        models = models_of(shape, 1, [(HEAD_RANK, QUERY_RANK, rank) for rank in args.ranks], dtype)
        facts = {"part": "layer", "shape": shape.name, "precision": precision, "cache": "static"}
        for batch, cached in itertools.product(args.batches, args.cached):
            calls = {form: layer_step_of(model, shape, batch, cached) for form, model in models.items()}
            yield from timed(calls, args, **facts, batch=batch, tokens=cached)


def step(args: argparse.Namespace, kinds: tuple[str, ...] = ("static", "dynamic")) -> Iterator[dict[str, Any]]:
    """Rows of whole models, with the megabytes of their caches."""
    for shape, precision, dtype in settings(args):
        models = models_of(shape, args.layers, [(HEAD_RANK, QUERY_RANK, args.ranks[len(args.ranks) // 2])], dtype)
        for kind, batch, cached in itertools.product(kinds, args.batches, args.cached):
            steps = {form: step_of(model, batch, cached, kind == "static") for form, model in models.items()}
            facts = {"part": "step", "shape": shape.name, "precision": precision, "cache": kind}
            calls = {form: call for form, (call, _) in steps.items()}
            for row in timed(calls, args, **facts, batch=batch, tokens=cached):
                call, cache = steps[row["form"]]
                kept = [x for part in cache.layers for x in (part.keys, part.values)]
                row["cache_mb"] = sum(x.untyped_storage().nbytes() for x in kept) / 1e6
                kept += list(models[row["form"]].parameters())
                yield row | {"peak_mb": peak_bytes(call, kept, CPU) / 1e6}


def compiled(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of whole models on a static cache, compiled as one graph."""
    for shape, precision, dtype in settings(args):
        ranks = [(HEAD_RANK, QUERY_RANK, args.ranks[len(args.ranks) // 2])]
        models = {n: m for n, m in models_of(shape, args.layers, ranks, dtype).items() if "re-expanding" not in n}
        facts = {"part": "compiled", "shape": shape.name, "precision": precision, "cache": "static"}
        for batch, cached in itertools.product(args.batches, args.cached):
            torch.compiler.reset()
            calls = {
                name: step_of(model, batch, cached, True, torch.compile(model.forward, fullgraph=True))[0]
                for name, model in models.items()
            }
            yield from timed(calls, args, **facts, batch=batch, tokens=cached)


def prefill(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of a prompt of 1,024 tokens in one attention layer, without a cache."""
    for shape, precision, dtype in settings(args):
        models = models_of(shape, 1, [(HEAD_RANK, QUERY_RANK, rank) for rank in PREFILL_RANKS], dtype)
        calls = {name: prefill_of(model, shape, PREFILL) for name, model in models.items()}
        facts = {"part": "prefill", "shape": shape.name, "precision": precision, "cache": "none", "batch": 1}
        yield from timed(calls, args, **facts, tokens=PREFILL)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown for people, a section for each kind of call."""
    keys = ("part", "shape", "precision", "cache", "batch", "tokens")
    text = []
    for kind, group in itertools.groupby(rows, key=lambda row: tuple(row[key] for key in keys)):
        part, shape, precision, cache, batch, tokens = kind
        cells = [[row["form"], f"{row['ms']:.3f}", f"{row['tokens_per_s']:.0f}",
                  f"{row['speedup']:.2f} [{row['speedup_25']:.2f}, {row['speedup_75']:.2f}]",
                  *(f"{row[key]:.1f}" if key in row else "" for key in ("cache_mb", "peak_mb"))] for row in group]  # fmt: skip
        header = ("form", "ms", "tokens/s", "speed-up", "cache MB", "peak MB")
        text += [f"### {part}, {shape}, {precision}, {cache} cache, batch {batch}, {tokens} tokens", "",
                 markdown(header, cells), ""]  # fmt: skip
    return "\n".join(text)


def main() -> int:
    """See the module."""
    parser = device_parser(__doc__)
    parser.set_defaults(turns=7, seconds=0.05)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--cached", nargs="+", type=int, default=[256, 1024, 4096, 8192], help="tokens")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--ranks", nargs="+", type=int, default=[32, 64, 128], help="r3")
    parser.add_argument("--layers", type=int, default=4, help="of the models of whole steps")
    parser.add_argument(
        "--save", type=Path, metavar="FOLDER", help="decoding.csv, decoding.json, decoding.md, decoding.png"
    )
    args = parser.parse_args()
    try:
        machine = start(args, [])
    except VitTuckerError as error:
        parser.error(str(error))
    parts = {"attention": attention, "layer": layer, "step": step, "compiled": compiled, "prefill": prefill}
    rows = [row for part in args.parts for row in parts[part](args)]
    save_tables(args, "decoding", COLUMNS, rows, table(rows), machine)
    if args.save is not None:
        plain = [{key: rounded(value) for key, value in row.items()} for row in rows]
        (args.save / "decoding.json").write_text(json.dumps(plain, indent=1) + "\n")
        draw_decoding(rows, args.save / "decoding.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
