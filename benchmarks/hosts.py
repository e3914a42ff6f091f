"""Patches and runs every timm model that docs/hosts.md calls patchable, at full rank against its own outputs, and compressed.

    python benchmarks/hosts.py --out benchmarks/results/hosts [--filter 'vit_*']

Models are random, in float64, and where their constructor allows it one or two blocks deep, at most 384 wide and for images of
224 pixels. A row is written for each model and method as soon as it is there; rows that are there are not run again. Exit status
1 if a difference at full rank is above TOLERANCE or one of a compressed model below it, or if a model could not be run.
"""

import argparse
import csv
import gc
import time
import warnings
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import vit_tucker as vt
from vit_tucker.analysis.host_map import build_structure, model_entry, model_names
from vit_tucker.errors import one_line
from vit_tucker.hosts.families import read_host
from vit_tucker.hosts.find import find_attention
from vit_tucker.hosts.images import input_shape

TOLERANCE = 1e-9
"""Largest difference over the largest output: float64 leaves about 1e-15, an ill-conditioned random model a little more."""
STAGES = {"depths": (1, 1, 1, 1)}
SHALLOW: tuple[dict[str, Any], ...] = (
    {"depth": 2, "img_size": 224},
    {"depth": 2, "img_size": 224, "num_kv_heads": 4},
    {"depth": 2},
    STAGES | {"embed_dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24)},
    STAGES | {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "img_size": 224},
    STAGES | {"embed_dim": (64, 128, 256, 512), "img_size": 224},
    STAGES | {"img_size": 224},
    STAGES,
    {"depths": (2, 2, 2, 2)},
    {"depth": (1, 1, 1)},
    {"layers": (1, 1, 1, 1, 1), "embed_dims": (64, 128, 256, 256, 512)},
    {},
)
WIDTH = 384
LARGEST = 500_000_000
"""Parameters of a model that is still run."""
COLUMNS = ("model", "method", "map", "layers", "embed_dim", "params_m", "full_rank_difference", "compressed_difference",
           "compressed_share", "seconds")  # fmt: skip


def shallow_model(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """The model with few blocks, on the CPU, and the shape of its images."""
    for options in SHALLOW:
        try:
            with torch.device("meta"):
                model = timm.create_model(name, **options)
            found = find_attention(model)
        except Exception:  # the constructor has no such argument, or not for this model
            continue
        if not found or sum(p.numel() for p in model.parameters()) > LARGEST:  # nothing attends any more, or too large
            continue
        if "depth" in options and max(read_host(module).spec.embed_dim for module in found.values()) > WIDTH:
            with suppress(Exception):  # widths that are not free are kept
                model = timm.create_model(name, **options, embed_dim=WIDTH, num_heads=WIDTH // 32)
                return model, input_shape(model, options.get("img_size"))
        model = timm.create_model(name, **options)
        return model, input_shape(model, options.get("img_size"))
    raise RuntimeError(f"{name} can't be built")


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Random values of order 1/sqrt(fan-in): timm starts biases at zero and layer scales near it, which would hide losses."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.3
        p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale + (p.ndim == 1) * 0.1)


def compressed(model: nn.Module, method: str) -> vt.AttentionConfig:
    """A small config that fits all layers."""
    specs = [read_host(module).spec for module in find_attention(model).values()]
    return vt.get_method(method).example(min(specs, key=lambda spec: (spec.embed_dim, spec.num_heads)))


@torch.no_grad()
def check(name: str) -> list[dict[str, Any]]:
    """Rows of one model; none if no method takes it."""
    entry = model_entry(name, build_structure(name))
    methods = [method for method in entry.methods if entry.patchable(method)]
    if not methods:
        return []
    model, shape = shallow_model(name)
    randomise(model)
    model = model.eval().double()
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = tensor_of(model(x))
    size = expected.abs().max()
    rows = []
    for method in methods:
        start, differences = time.perf_counter(), []
        for config in (vt.full_rank_config(model, method), compressed(model, method)):
            report = vt.patch(model, config)
            differences.append(((tensor_of(model(x)) - expected).abs().max() / size).item())
            vt.unpatch(model)
        rows.append(
            {
                "model": name,
                "method": method,
                "map": entry.methods[method],
                "layers": len(report.layers),
                "embed_dim": max(read_host(module).spec.embed_dim for module in find_attention(model).values()),
                "params_m": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}",
                "full_rank_difference": f"{differences[0]:.1e}",
                "compressed_difference": f"{differences[1]:.1e}",
                "compressed_share": f"{report.params_after / report.params_before:.3f}",
                "seconds": f"{time.perf_counter() - start:.1f}",
            }
        )
    return rows


def tensor_of(output: Any) -> torch.Tensor:
    """The first tensor of a model's output."""
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def run(names: list[str], file: Path) -> list[str]:
    """Writes the rows of models that are not in the file yet; returns what could not be run, and why."""
    old = read(file)
    done, failed = {row["model"] for row in old}, []
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        if not old:
            writer.writeheader()
        for name in names:
            if name in done:
                continue
            try:
                rows = check(name)
            except Exception as error:
                failed.append(f"{name}: {type(error).__name__}: {one_line(error, 200)}")
                print(failed[-1], flush=True)
                continue
            for row in rows:
                writer.writerow(row)
                print(" ".join(map(str, row.values())), flush=True)
            stream.flush()
            gc.collect()
    return failed


def read(file: Path) -> list[dict[str, str]]:
    """Rows by model; none without the file."""
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        return sorted(csv.DictReader(stream), key=lambda row: (row["model"], row["method"]))


def summary(rows: list[dict[str, str]], failed: list[str]) -> tuple[str, bool]:
    """Markdown: how many, how exact; and whether all is well."""
    lines = [
        "| method | map | models | layers | largest difference at full rank | smallest difference compressed |",
        "|---|---|---|---|---|---|",
    ]
    bad = [row for row in rows if not float(row["full_rank_difference"]) <= TOLERANCE]
    for key in sorted({(row["method"], row["map"]) for row in rows}):
        mine = [row for row in rows if (row["method"], row["map"]) == key]
        full, less = ([float(row[f"{kind}_difference"]) for row in mine] for kind in ("full_rank", "compressed"))
        layers = sum(int(row["layers"]) for row in mine)
        numbers = f"{max(full):.1e} | {'' if key[0] == 'mha' else f'{min(less):.1e}'}"  # MHA has nothing to compress
        lines.append(f"| {key[0]} | {key[1]} | {len(mine)} | {layers} | {numbers} |")
    same = [row for row in rows if row["method"] != "mha" and not float(row["compressed_difference"]) > TOLERANCE]
    models = len({row["model"] for row in rows})
    lines += [
        "",
        f"{models} models, {len(rows)} conversions: {len(bad)} differ by more than {TOLERANCE:g} at full rank, {len(same)} by "
        f"less when compressed, {len(failed)} could not be run. Differences are relative to the largest output, in float64.",
        f"{date.today()}, torch {torch.__version__}, timm {timm.__version__}, CPU.",
        *(f"- {line}" for line in failed),
    ]
    return "\n".join(lines) + "\n", not bad and not same and not failed


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--filter", metavar="PATTERN", help="names of models with wildcards")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.csv"
    failed = run(model_names(args.filter), file)
    rows = read(file)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text, good = summary(rows, failed)
    (args.out / "results.md").write_text(text)
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
