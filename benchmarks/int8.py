"""What 8 bits cost an exported model: error, accuracy and time of the ways to quantise, on the evaluation images of a run.

    python benchmarks/int8.py runs/digits-dense-0 runs/digits-tucker_r16_finetune-0 --save benchmarks/results/int8

Each run's model is exported to ONNX, quantised in several ways, and compared with PyTorch on all its evaluation images. Times are
of onnxruntime's CPU provider, in turns, over the float32 file's own in the same turn; above 1: faster. Exit status: 0 measured, 2
bad arguments.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from output import save_tables, start
from timm.data import resolve_data_config
from turns import in_turns

from vit_tucker.data.samples import evaluation_images
from vit_tucker.errors import ConfigError, VitTuckerError
from vit_tucker.export.capture import served
from vit_tucker.export.compare import compare
from vit_tucker.export.export import export_model
from vit_tucker.export.int8 import QUANTISED, quantise
from vit_tucker.export.onnx_file import onnx_runner
from vit_tucker.inference.predict import open_classifier, run_config
from vit_tucker.patching.record import patch_record
from vit_tucker.show.tables import markdown

WAYS: dict[str, dict[str, Any]] = {
    "int8, one scale per matrix": {"per_channel": False},
    "int8, one scale per output channel": {},
    "the same in 7 bits": {"reduce_range": True},
    "8 bits, convolutions too": {"operators": (*QUANTISED, "Conv")},
}
COLUMNS = ("run", "attention", "weights", "images", "relative_error", "agreement", "top1", "file_mb", "infer_step_time",
           "infer_speedup", "infer_speedup_25", "infer_speedup_75")  # fmt: skip


def measure(where: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one run: float32, then each way."""
    config = run_config(where)
    if config is None:
        raise ConfigError(f"{where}: no run folder")
    model = open_classifier(where)
    record = patch_record(model)
    attention = "dense" if record is None else f"{record.config.method} {record.report.layers[0].options}"
    with tempfile.TemporaryDirectory() as folder:
        float32 = export_model(model, Path(folder) / "float32.onnx").path
        files = {"float32": float32}
        for number, (name, options) in enumerate(WAYS.items()):
            files[name] = Path(folder) / f"{number}.onnx"
            quantise(float32, files[name], **options)
        runners = {name: onnx_runner(file, torch.get_num_threads()) for name, file in files.items()}
        data = resolve_data_config({}, model=model)
        plain = served(model, False)
        with torch.no_grad():
            found = compare(plain, runners, evaluation_images(config.data, data, args.images, 32))
        batch = torch.randn(args.batch_size, *data["input_size"])
        calls = {name: partial(run, batch) for name, run in runners.items()}
        timings = in_turns(calls, torch.device("cpu"), args.turns, args.seconds)
        sizes = {name: file.stat().st_size / 1e6 for name, file in files.items()}
    rows = []
    for name, result in found.items():
        rows.append({
            "run": Path(where).name, "attention": attention, "weights": name, "images": result.images,
            "relative_error": result.relative_error, "agreement": result.agreement, "top1": result.accuracy_file,
            "file_mb": sizes[name], "infer_step_time": timings[name].ms, "infer_speedup": timings[name].speedup,
            "infer_speedup_25": timings[name].low, "infer_speedup_75": timings[name].high,
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown for people."""
    header = (
        "run",
        "attention",
        "weights",
        "images",
        "error of largest logit",
        "same top-1",
        "top-1",
        "file MB",
        "speed",
    )
    cells = [
        [row["run"], row["attention"], row["weights"], str(row["images"]), f"{row['relative_error']:.1e}",
         f"{row['agreement']:.2%}", f"{row['top1']:.2%}", f"{row['file_mb']:.2f}",
         f"{row['infer_speedup']:.2f} [{row['infer_speedup_25']:.2f}, {row['infer_speedup_75']:.2f}]"]
        for row in rows
    ]  # fmt: skip
    return markdown(header, cells, text_columns=3)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--images", type=int, default=10_000, help="at most")
    parser.add_argument("--batch-size", type=int, default=32, help="of the timed passes")
    parser.add_argument("--threads", type=int, default=None, help="of torch and onnxruntime")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.1, help="that a turn lasts at least")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="int8.csv, int8.md")
    parser.set_defaults(device="cpu", precision="fp32", compile=False)
    args = parser.parse_args()
    try:
        machine = start(args, backends=[])
        rows = [row for where in args.runs for row in measure(where, args)]
    except VitTuckerError as error:
        parser.error(str(error))
    print(table(rows))
    save_tables(args, "int8", COLUMNS, rows, table(rows), machine)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
