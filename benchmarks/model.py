"""Whole ViTs with their attention replaced: images per second against the dense model, and against what Amdahl's law allows.

    python benchmarks/model.py --save benchmarks/results/model_cpu [--models vit_base_patch16_224 ...] [--compile]

The dense model, the patched ones, and one attention layer of each at the model's shape run in one process, in turns. Attention is
the share f of the dense model's time, depth times its layer's; a layer that is s times as fast can bring the model to
1 / (1 - f + f / s) at most: Amdahl's bound. ``of bound`` is the measured speed-up over that bound; 1 means that nothing is lost.
A training step is a forward and a backward pass, the optimizer apart. Columns of the CSV have timm's names where timm has such
a column. Exit status: 0 measured, 2 bad arguments.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from attention_layers import Shape, built, title, tucker
from output import device_parser, save_tables, start
from turns import in_turns, inference, peak_megabytes, training

import vit_tucker as vt
from vit_tucker.errors import VitTuckerError
from vit_tucker.hosts.families import read_host
from vit_tucker.hosts.find import find_attention
from vit_tucker.show.tables import markdown

MODELS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
RANKS = (16, 32, 64)
COLUMNS = (
    *("model", "attention", "precision", "compiled", "param_count", "infer_batch_size", "infer_img_size"),
    *("infer_samples_per_sec", "infer_step_time", "train_batch_size", "train_img_size", "train_samples_per_sec"),
    *("train_step_time", "train_peak_mb", "infer_speedup", "infer_speedup_25", "infer_speedup_75", "train_speedup"),
    *("train_speedup_25", "train_speedup_75", "infer_layer_speedup", "train_layer_speedup", "infer_attention_share"),
    *("train_attention_share", "infer_bound", "train_bound", "infer_of_bound", "train_of_bound"),
)


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one model: dense, then patched."""
    device = torch.device(args.device)
    dense = timm.create_model(name, num_classes=1000)
    found = find_attention(dense)
    spec, size = read_host(next(iter(found.values()))).spec, timm.data.resolve_model_data_config(dense)["input_size"]
    tokens = dense.patch_embed.num_patches + dense.num_prefix_tokens
    shape = Shape(args.batch_size, tokens, spec.embed_dim, spec.num_heads)
    asked = [tucker(shape, rank).model_copy(update={"init": "random", "backend": args.backend}) for rank in args.ranks]
    configs = {"dense": None, **{title(config): config for config in asked}}
    models, layers = {}, {}
    for key, config in configs.items():
        model = timm.create_model(name, num_classes=1000)
        layer = next(iter(find_attention(model).values())) if config is None else built(config, spec)
        if config is not None:
            vt.patch(model, config)
        models[key], layers[key] = model.to(device).train(), layer.to(device).train()
        if args.compile:
            models[key].compile()
            layers[key].compile()
    images = torch.randn(args.batch_size, *size, device=device)
    x = torch.randn(args.batch_size, tokens, spec.embed_dim, device=device)
    run = partial(in_turns, device=device, turns=args.turns, seconds=args.seconds)
    rows: list[dict[str, Any]] = [
        {"model": name, "attention": key, "precision": args.precision, "compiled": args.compile,
         "param_count": sum(p.numel() for p in model.parameters()) / 1e6}
        for key, model in models.items()
    ]  # fmt: skip
    for kind in ("infer", "train"):
        whole, part = (partial(training, input_grad=False), training) if kind == "train" else (inference, inference)
        model_times = run({key: whole(model, images, args.precision) for key, model in models.items()})
        layer_times = run({key: part(layer, x, args.precision) for key, layer in layers.items()})
        share = len(found) * layer_times["dense"].ms / model_times["dense"].ms
        for row in rows:
            timing, layer_speedup = model_times[row["attention"]], layer_times[row["attention"]].speedup
            bound = 1 / (1 - share + share / layer_speedup)
            row |= {
                f"{kind}_batch_size": args.batch_size,
                f"{kind}_img_size": size[-1],
                f"{kind}_samples_per_sec": 1e3 * args.batch_size / timing.ms,
                f"{kind}_step_time": timing.ms,
                f"{kind}_speedup": timing.speedup,
                f"{kind}_speedup_25": timing.low,
                f"{kind}_speedup_75": timing.high,
                f"{kind}_layer_speedup": layer_speedup,
                f"{kind}_attention_share": share,
                f"{kind}_bound": bound,
                f"{kind}_of_bound": timing.speedup / bound,
            }
    for row in rows:
        model = models[row["attention"]]
        row["train_peak_mb"] = peak_megabytes(training(model, images, args.precision, input_grad=False), model, images)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown for people."""
    header = ("model", "attention", "parameters M", "infer images/s", "train images/s", "infer speed-up", "train speed-up",
              "attention's share", "Amdahl's bound", "of bound", "step's peak MB")  # fmt: skip
    cells = []
    for row in rows:
        speedups = [f"{row[f'{kind}_speedup']:.2f} [{row[f'{kind}_speedup_25']:.2f}, {row[f'{kind}_speedup_75']:.2f}]"
                    for kind in ("infer", "train")]  # fmt: skip
        pairs = [" / ".join(f"{row[f'{kind}_{column}']:.2f}" for kind in ("infer", "train"))
                 for column in ("attention_share", "bound", "of_bound")]  # fmt: skip
        cells.append([row["model"], row["attention"], f"{row['param_count']:.1f}", f"{row['infer_samples_per_sec']:.1f}",
                      f"{row['train_samples_per_sec']:.1f}", *speedups, *pairs, f"{row['train_peak_mb']:.0f}"])  # fmt: skip
    return markdown(header, cells, text_columns=2)


def main() -> int:
    """See the module."""
    parser = device_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="timm's ViTs")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS), help="query/output and key/value ranks")
    parser.add_argument("--backend", default="auto", help="of the patched layers")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="model.csv, model.md")
    args = parser.parse_args()
    try:
        unknown = [name for name in args.models if not timm.is_model(name)]
        if unknown:
            parser.error(f"timm has no model {', '.join(unknown)}")
        machine = start(args, backends=[args.backend])
    except VitTuckerError as error:
        parser.error(str(error))
    rows: list[dict[str, Any]] = []
    for name in args.models:
        rows += measure(name, args)
        print(table(rows[-len(args.ranks) - 1 :]), flush=True)
    save_tables(args, "model", COLUMNS, rows, table(rows), machine)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
