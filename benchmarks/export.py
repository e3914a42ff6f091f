"""Exported ViTs in onnxruntime: latency and file size of dense and replaced attention, in float32 and int8, beside PyTorch.

    python benchmarks/export.py --save benchmarks/results/export [--models vit_small_patch16_224 ...] [--batch-sizes 1 8]

Each model is exported with random weights (times don't depend on them; accuracy is what ``python -m vit_tucker export`` reports),
checked against PyTorch, and run by onnxruntime's CPU provider and by PyTorch in eager mode, all in one process and in turns.
Speed-ups are times of the dense model's float32 file over a file's own in the same turn; above 1: faster.
Exit status: 0 measured, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from output import save_tables, start
from turns import in_turns

import vit_tucker as vt
from vit_tucker.errors import VitTuckerError
from vit_tucker.export.compare import compare, random_batches
from vit_tucker.export.export import export_model
from vit_tucker.export.int8 import quantise
from vit_tucker.export.onnx_file import onnx_runner, require_packages
from vit_tucker.hosts.families import read_host
from vit_tucker.hosts.find import find_attention
from vit_tucker.show.tables import markdown

COLUMNS = (
    *("model", "attention", "runtime", "precision", "param_count", "file_mb", "infer_batch_size", "infer_img_size"),
    *("infer_step_time", "infer_samples_per_sec", "infer_speedup", "infer_speedup_25", "infer_speedup_75"),
    "logit_error",
)


def configs(name: str, ranks: list[int], asked: list[str]) -> dict[str, vt.AttentionConfig | None]:
    """What takes the attention's place, by title; the dense model first."""
    heads = read_host(next(iter(find_attention(timm.create_model(name)).values()))).spec.num_heads
    kept = max(1, heads // 2)
    found: dict[str, vt.AttentionConfig | None] = {"dense": None}
    if "gqa" in asked:
        found["GQA-1"] = vt.GQAConfig(num_kv_heads=1, init="random")
    for rank in ranks:
        if "mla" in asked:
            found[f"MLA ({rank},{rank})"] = vt.MLAConfig(q_lora_rank=rank, kv_lora_rank=rank, init="random")
        if "tucker" in asked:
            found[f"Tucker ({kept},{rank},{rank})"] = vt.TuckerConfig(ranks=(kept, rank, rank), init="random")
    return found


def prepare(
    name: str, config: vt.AttentionConfig | None, folder: Path
) -> dict[tuple[str, str], tuple[Any, dict[str, Any]]]:
    """By runtime and precision: what runs a model, and what is known of it."""
    model = timm.create_model(name).eval()
    if config is not None:
        vt.patch(model, config, keep_originals=False)
    exported = export_model(model, folder / "float32.onnx")
    small = folder / "int8.onnx"
    quantise(exported.path, small)
    size = timm.data.resolve_model_data_config(model)["input_size"]
    images = random_batches([(4, *size[1:])], size[0], unit=False)
    run = onnx_runner(small)
    error = compare(inference_of(model), {"int8": run}, images)["int8"].relative_error
    params = {"param_count": sum(p.numel() for p in model.parameters()) / 1e6}
    return {
        ("onnxruntime", "fp32"): (
            onnx_runner(exported.path),
            {
                **params,
                "file_mb": exported.stages[0].bytes / 1e6,
                "logit_error": exported.stages[0].random.relative_error,
            },
        ),
        ("onnxruntime", "int8"): (run, {**params, "file_mb": small.stat().st_size / 1e6, "logit_error": error}),
        ("PyTorch", "fp32"): (inference_of(model), params),
    }


def inference_of(model: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward pass without gradients."""

    def run(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            y: torch.Tensor = model(images)
        return y

    return run


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one model: for each batch size, all attentions in all runtimes."""
    rows: list[dict[str, Any]] = []
    ready: dict[tuple[str, str, str], tuple[Any, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, config in configs(name, args.ranks, args.methods).items():
            own = prepare(name, config, Path(folder))
            ready |= {(title, *key): value for key, value in own.items()}
    size = timm.data.resolve_model_data_config(timm.create_model(name))["input_size"]
    for count in args.batch_sizes:
        images = torch.randn(count, *size)
        calls = {" | ".join(key): partial(run, images) for key, (run, _) in ready.items()}
        timings = in_turns(calls, torch.device("cpu"), args.turns, args.seconds)
        for key, (_, facts) in ready.items():
            timing = timings[" | ".join(key)]
            rows.append({
                "model": name, **dict(zip(("attention", "runtime", "precision"), key, strict=True)), **facts,
                "infer_batch_size": count, "infer_img_size": size[-1], "infer_step_time": timing.ms,
                "infer_samples_per_sec": 1e3 * count / timing.ms, "infer_speedup": timing.speedup,
                "infer_speedup_25": timing.low, "infer_speedup_75": timing.high,
            })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown for people."""
    header = ("model", "attention", "runtime", "precision", "batch", "parameters M", "file MB", "ms", "images/s",
              "speed-up", "logit error")  # fmt: skip
    cells = [
        [row["model"], row["attention"], row["runtime"], row["precision"], str(row["infer_batch_size"]),
         f"{row['param_count']:.1f}", f"{row['file_mb']:.1f}" if "file_mb" in row else "",
         f"{row['infer_step_time']:.1f}", f"{row['infer_samples_per_sec']:.1f}",
         f"{row['infer_speedup']:.2f} [{row['infer_speedup_25']:.2f}, {row['infer_speedup_75']:.2f}]",
         f"{row['logit_error']:.0e}" if "logit_error" in row else ""]
        for row in rows
    ]  # fmt: skip
    return markdown(header, cells, text_columns=4)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224"], help="timm's ViTs")
    parser.add_argument("--ranks", nargs="+", type=int, default=[32], help="of Tucker Attention and MLA")
    parser.add_argument("--methods", nargs="*", choices=("gqa", "mla", "tucker"), default=["gqa", "mla", "tucker"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=None, help="of torch and onnxruntime")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.1, help="that a turn lasts at least")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="export.csv, export.md")
    parser.set_defaults(device="cpu", precision="fp32", compile=False)
    args = parser.parse_args()
    try:
        require_packages()
        unknown = [name for name in args.models if not timm.is_model(name)]
        if unknown:
            parser.error(f"timm has no model {', '.join(unknown)}")
        if min(args.batch_sizes) < 1:
            parser.error("--batch-sizes: 1 at least")
        machine = start(args, backends=[])
    except VitTuckerError as error:
        parser.error(str(error))
    import onnxruntime

    rows: list[dict[str, Any]] = []
    for name in args.models:
        rows += measure(name, args)
        print(table(rows), flush=True)
    text = f"{table(rows)}\n\n- onnxruntime {onnxruntime.__version__}; speed-ups are over the dense float32 file"
    save_tables(args, "export", COLUMNS, rows, text, machine)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
