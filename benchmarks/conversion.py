"""How fast conversions are: one layer's decomposition against tensorly in the same process, and whole models with their memory.

    python benchmarks/conversion.py layer                 # HOSVD and HOOI of a ViT-B/16 layer, ours and tensorly's in turns
    python benchmarks/conversion.py models                # HOSVD of ViT-B/16, ViT-L/16 and ViT-G/14, all layers
    python benchmarks/conversion.py layer models --save FOLDER

Times of a machine mean little; the ratios of `layer` are what counts. Weights are random: the arithmetic is the same.
`models` starts a process for each, so that the peak of its memory is its own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import vit_tucker as vt
from vit_tucker.tensor.tucker import Pairs, Tucker, hooi, hosvd

MODELS = {
    "vit_base_patch16_224": (8, 16, 16),
    "vit_large_patch16_224": (8, 16, 16),
    "vit_gigantic_patch14_224": (8, 16, 16),
}
HEADS, WIDTH, HEAD_DIM = 12, 768, 64
RANKS = ((12, 128, 128), (8, 64, 64), (8, 16, 16))


def random_pairs() -> Pairs:
    """A ViT-B/16 layer's pre-softmax tensor with the falling spectrum of trained weights."""
    generator = torch.Generator().manual_seed(0)
    decay = torch.logspace(0, -2, WIDTH, dtype=torch.float64)[None, :, None]
    sides = [torch.randn(HEADS, WIDTH, HEAD_DIM, generator=generator, dtype=torch.float64) * decay for _ in range(2)]
    return Pairs(sides[0], sides[1])


def alternate(peers: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, called in turns after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for number in range(rounds + 1):
        for name, call in peers.items():
            started = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def layer_rows(rounds: int) -> list[dict[str, Any]]:
    """Ours against tensorly's tucker and partial_tucker on the formed tensor, float64, pytorch backend, at equal error.

    Without iterations all of them are the HOSVD; with one step all of them are HOOI.
    """
    import tensorly
    from tensorly.decomposition import partial_tucker, tucker

    tensorly.set_backend("pytorch")
    pairs = random_pairs()
    tensor = pairs.dense()
    norm = tensor.norm()

    def error(core: Tensor, factors: list[Tensor]) -> float:
        return ((tensor - torch.einsum("abc,ha,ib,jc->hij", core, *factors)).norm() / norm).item()

    def ours(result: Tucker) -> float:
        return error(result.core, [result.head, result.left, result.right])

    rows = []
    for ranks in RANKS:
        for steps, name, call in (
            (0, "hosvd", partial(hosvd, pairs, ranks)),
            (1, "hooi, 1 step", partial(hooi, pairs, ranks, 1)),
        ):
            options: dict[str, Any] = {"rank": list(ranks), "init": "svd", "tol": 0, "n_iter_max": steps}
            peers: dict[str, Callable[[], Any]] = {
                name: call,
                f"tensorly tucker, {steps} steps": partial(tucker, tensor, **options),
                f"tensorly partial_tucker, {steps} steps": partial(partial_tucker, tensor, modes=[0, 1, 2], **options),
            }
            seconds = alternate(peers, rounds)
            for peer, run in peers.items():
                result = run()
                result = result[0] if "partial" in peer else result
                found = ours(result) if isinstance(result, Tucker) else error(*result)
                rows.append({"ranks": list(ranks), "what": peer, "seconds": seconds[peer], "error": found,
                             "times slower than ours": seconds[peer] / seconds[name]})  # fmt: skip
                print(rows[-1], flush=True)
    return rows


def empty_model(name: str) -> nn.Module:
    """The model with random weights, float32, quickly: large ones take minutes to initialise."""
    with torch.device("meta"):
        model = timm.create_model(name)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
        for buffer in model.buffers():
            buffer.zero_()
    return model


def resident_bytes() -> int:
    """Memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def convert_model(name: str) -> dict[str, Any]:
    """HOSVD of all attention layers with the report; memory relative to the model's own, originals dropped."""
    before = resident_bytes()
    model = empty_model(name)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    started = time.perf_counter()
    report = vt.patch(model, vt.TuckerConfig(ranks=MODELS[name]), keep_originals=False)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"model": name, "ranks": list(MODELS[name]), "layers": len(report.layers), "seconds": seconds,
            "conversion seconds": report.seconds, "model GB": size / 1e9, "peak / model": peak / size}  # fmt: skip


def model_rows(names: list[str]) -> list[dict[str, Any]]:
    """Each model in a process of its own."""
    rows = []
    for name in names:
        command = [sys.executable, __file__, "--one", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="what to measure: layer, models")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS), help="which models")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="for speed.json and speed.md")
    parser.add_argument("--one", choices=list(MODELS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(convert_model(args.one)))
        return
    if not args.what or set(args.what) - {"layer", "models"}:
        parser.error("say what to measure: layer, models, or both")
    results = {"layer": layer_rows(args.rounds) if "layer" in args.what else [],
               "models": model_rows(args.only) if "models" in args.what else []}  # fmt: skip
    note = f"{date.today()}, torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} CPU threads"
    text = "\n\n".join([table(rows) for rows in results.values() if rows] + [note])
    print(text)
    if args.save is not None:
        args.save.mkdir(parents=True, exist_ok=True)
        (args.save / "speed.json").write_text(json.dumps({**results, "note": note}, indent=2) + "\n")
        (args.save / "speed.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
