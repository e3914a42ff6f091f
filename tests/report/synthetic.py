"""Results of runs that never happened, with a known truth: accuracy = ceiling - scale / attention parameters + noise."""

import copy
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

DENSE_PARAMS = 264_192
CEILING = 95.0
TUCKER = [((2, 4, 4), 9_000), ((4, 8, 8), 20_000), ((8, 16, 16), 45_000), ((8, 32, 32), 100_000)]
GQA = [(1, 70_000), (2, 110_000), (4, 200_000)]
MLA = [(4, 50_000), (16, 80_000), (32, 130_000), (64, 200_000)]
SCALES = {"tucker": 2e4, "mla": 6e4, "gqa": 1e5, "dense": 0.0}
"""At equal accuracy GQA needs 5 times the parameters of Tucker, MLA 3 times."""

MODEL = {"name": "vit_tiny_patch16_224", "pretrained": False, "checkpoint": None, "depth": 4, "embed_dim": 128}


def accuracy(method: str, params: float) -> float:
    """The truth without noise."""
    return CEILING - SCALES[method] / params


def run_results(
    name: str, attention: dict[str, Any] | None, params: int, top1: float, seed: int = 0, **changes: Any
) -> dict[str, Any]:
    """results.json of a finished run.

    Args:
        name: of the config.
        attention: its section, None for dense.
        params: attention parameters.
        top1: after the last epoch; the curve rises to it.
        seed: of the run.
        changes: dotted keys, ``**{"config.train.epochs": 4}``.
    """
    epochs = 8
    rises = [top1 - 30 * 2.0 ** -(epoch - 1) * (epoch < epochs) for epoch in range(1, epochs + 1)]
    curve = [
        {"epoch": epoch, "train_loss": 2.0 / epoch, "eval_loss": 1.5 / epoch, "eval_top1": value, "eval_top5": 99.0, "lr": 1e-3}
        for epoch, value in enumerate(rises, start=1)
    ]  # fmt: skip
    options = "" if attention is None else " ".join(
        f"{key}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in attention.items() if key in ("ranks", "num_kv_heads", "q_lora_rank", "shared_kv"))  # fmt: skip
    ratio = 0.5 + 0.5 * params / DENSE_PARAMS
    results = {
        "name": name,
        "config": {
            "name": name,
            "seed": seed,
            "output_dir": f"runs/fig3/{name}/seed{seed}",
            "plugins": [],
            "model": {**MODEL, "checkpoint": f"runs/fig3/start/seed{seed}"},
            "attention": copy.deepcopy(attention),
            "data": {"dataset": "digits", "root": "data", "num_workers": 0},
            "train": {"epochs": epochs, "lr": 1e-3, "global_batch_size": 32, "log_interval": 50},
        },
        "environment": {"python": "3.11", "torch": "2.6", "timm": "1.0", "accelerate": "1.2", "commit": "abc" * 13 + "d",
                        "device": "cpu"},
        "processes": 1,
        "precision": "no",
        "params": {"total": params + 270_000, "attention": params, "dense_total": 534_192, "dense_attention": DENSE_PARAMS},
        "patch": None if attention is None else {"layers": [{"method": attention["method"], "options": options}]},
        "data": {"input_size": [1, 16, 16], "num_eval": 360},
        "num_train": 1437,
        "epochs": epochs,
        "best": {"epoch": epochs - 1, "top1": top1 + 0.25, "top5": 99.0, "loss": 0.2},
        "last": curve[-1],
        "bad_images": [],
        "train_seconds": 10.0,
        "images_per_second": 1000.0,
        "finished": "2026-11-25",
        "curve": curve,
        "cost": {
            "flops": 2_000_000 + 40 * params,
            "dense_flops": 2_000_000 + 40 * DENSE_PARAMS,
            "latency": {"device": "cpu", "precision": "no", "threads": 1, "batch_size": 64, "turns": 20, "ms": 10 * ratio,
                        "dense_ms": 10.0, "ratio": ratio, "ratio_low": ratio - 0.02, "ratio_high": ratio + 0.02},
        },
    }  # fmt: skip
    for key, value in changes.items():
        *above, leaf = key.split(".")
        place: Any = results
        for part in above:
            place = place[part]
        place[leaf] = value
    return results


def study(
    seeds: int = 5, noise: float = 0.1, methods: tuple[str, ...] = ("tucker", "gqa", "mla")
) -> list[dict[str, Any]]:
    """A sweep: starts, the dense model fine-tuned, settings of each method. Those of a seed share half of the noise."""
    cells: list[tuple[str, dict[str, Any] | None, int]] = [("mha", None, DENSE_PARAMS)]
    for ranks, params in TUCKER:
        section = {"method": "tucker", "ranks": list(ranks), "conversion": "hosvd", "init": "pretrained"}
        cells.append((f"tucker-{'-'.join(map(str, ranks))}", section, params))
    cells += [(f"gqa{g}", {"method": "gqa", "num_kv_heads": g, "conversion": "mean"}, params) for g, params in GQA]
    cells += [(f"mla{c}", {"method": "mla", "q_lora_rank": c, "kv_lora_rank": c}, params) for c, params in MLA]
    runs = []
    for seed in range(seeds):
        shared = noise * np.random.default_rng(1000 + seed).standard_normal()
        start = {"config.model.checkpoint": None, "config.train.epochs": 30}
        runs.append(run_results("start", None, DENSE_PARAMS, CEILING - 1 + shared, seed, **start))
        for name, attention, params in cells:
            method = "dense" if attention is None else attention["method"]
            if attention is None or method in methods:
                own = noise * np.random.default_rng(seed + zlib.crc32(name.encode())).standard_normal()
                runs.append(run_results(name, attention, params, accuracy(method, params) + shared + own, seed))
    return runs


def write_runs(folder: Path, runs: list[dict[str, Any]]) -> Path:
    """Run folders below one, as the sweep leaves them."""
    for run in runs:
        place = folder / run["name"] / f"seed{run['config']['seed']}"
        place.mkdir(parents=True)
        (place / "config.yaml").write_text(f"name: {run['name']}\n")
        (place / "results.json").write_text(json.dumps(run, indent=2) + "\n")
    return folder
