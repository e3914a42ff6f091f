"""Does every family of timm that can be patched come out of the ONNX exporter right? Small models with random weights.

    python benchmarks/export_families.py --save benchmarks/results/export_families

The models are those of tests/patching/test_families.py. GQA and Tucker Attention are patched in, exported, and compared with
PyTorch for other numbers of images than the file was recorded with; the plain attention of GQA is compared in float64.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vit_tucker as vt
from tests.patching.test_families import FAMILIES, image, small_model
from vit_tucker.errors import VitTuckerError
from vit_tucker.export.export import export_model
from vit_tucker.hosts.families import read_host
from vit_tucker.hosts.find import find_attention
from vit_tucker.show.tables import csv_text

COLUMNS = ("model", "method", "onnx_relative_error", "file_over_weights", "dense_relative_error", "refused")


def measure(name: str, method: str) -> dict[str, Any]:
    """A row: errors relative to the largest logit, or why not."""
    row: dict[str, Any] = {"model": name, "method": method}
    torch.manual_seed(0)
    try:
        model = small_model(name)
        spec = read_host(next(iter(find_attention(model).values())), model).spec
        host = copy.deepcopy(model)
        vt.patch(model, vt.get_method(method).example(spec), keep_originals=False)
        if method == "gqa":
            x = image(model, FAMILIES[name].get("img_size"))
            with torch.no_grad():
                expected = model(x)
                dense = vt.dense_model(model, host)(x)
            row["dense_relative_error"] = ((dense - expected).abs().max() / expected.abs().max()).item()
        with tempfile.TemporaryDirectory() as folder:
            done = export_model(model.float(), Path(folder) / "model.onnx")
        row["onnx_relative_error"] = done.stages[0].random.relative_error
        row["file_over_weights"] = done.stages[0].bytes / done.parameter_bytes
    except VitTuckerError as error:
        row["refused"] = str(error)
    return row


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, required=True, metavar="FOLDER", help="families.csv")
    args = parser.parse_args()
    rows = []
    for name in FAMILIES:
        if "." not in name and not timm.is_model(name):
            continue
        for method in ("gqa", "tucker"):
            rows.append(measure(name, method))
            print(rows[-1], flush=True)
    args.save.mkdir(parents=True, exist_ok=True)
    (args.save / "families.csv").write_text(csv_text(COLUMNS, [[row.get(key) for key in COLUMNS] for row in rows]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
