"""How much of a trained model survives a conversion, without any training: weights alone against the tokens it sees.

    python benchmarks/conversion_quality.py --cfg benchmarks/configs/vit_s14_fashion_mnist.yaml model.checkpoint=FILE
    python benchmarks/conversion_quality.py --cfg fashion_mnist/dense --top1 model.checkpoint=runs/fashion_mnist-dense-0

All attention layers are converted. `cosine` compares the final features, token by token, with the dense model's on test images
that no conversion has seen; `top1` is the accuracy on the test set. `--save FOLDER` writes CSV, table and config.
"""

import argparse
import csv
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import vit_tucker as vt
from vit_tucker.build import classes_and_channels
from vit_tucker.cli import guarded
from vit_tucker.config.load import dump_config, load_config
from vit_tucker.config.schema import RunConfig
from vit_tucker.data.calibration import calibration_images
from vit_tucker.data.datasets import dataset_info, load_dataset
from vit_tucker.data.loaders import SeededDataset
from vit_tucker.data.transforms import eval_transform, resolve_data
from vit_tucker.models import create_host
from vit_tucker.patching.probe import input_shape

FEATURES = vt.Calibration()
COLUMNS = {
    "weights": None,  # HOSVD, or the method's own conversion
    "HOOI": None,
    "layer": FEATURES.model_copy(update={"objective": "layer"}),
    "features": FEATURES,
    "features, refined": FEATURES.model_copy(update={"refine_steps": 60}),
}


@dataclass(frozen=True)
class Case:
    """One row: a name, the config, and the same with HOOI."""

    name: str
    config: vt.AttentionConfig
    other: vt.AttentionConfig | None


def cases(ranks: str, peers: str) -> list[Case]:
    """Tucker at the given rank triples, "8,16,16 8,32,32"; GQA and MLA beside them, "gqa-mean:2 gqa-svd:2 mla:64"."""
    rows = []
    for text in ranks.split():
        r1, r2, r3 = (int(part) for part in text.split(","))
        config = vt.TuckerConfig(ranks=(r1, r2, r3))
        rows.append(Case(f"Tucker ({r1},{r2},{r3})", config, config.model_copy(update={"conversion": "hooi"})))
    for text in peers.split():
        name, _, number = text.partition(":")
        if name == "mla":
            rows.append(Case(f"MLA-{number}", vt.MLAConfig(q_lora_rank=int(number), kv_lora_rank=int(number)), None))
            continue
        gqa = vt.GQAConfig(num_kv_heads=int(number)).model_copy(update={"conversion": name.removeprefix("gqa-")})
        rows.append(Case(f"GQA-{number} {gqa.conversion}", gqa, None))
    return rows


@torch.no_grad()
def features(model: Any, batches: Iterable[Tensor]) -> Tensor:
    """Final features of each token, (images, tokens, C)."""
    return torch.cat([model.forward_features(batch) for batch in batches])


@torch.no_grad()
def top1(model: nn.Module, loader: DataLoader) -> float:
    """Accuracy in percent."""
    hits = count = 0
    for images, labels in loader:
        hits += int((model(images).argmax(1) == labels).sum())
        count += len(labels)
    return 100 * hits / count


def measure(args: argparse.Namespace, config: RunConfig) -> Iterator[dict[str, Any]]:
    """All rows and columns, one at a time."""
    torch.manual_seed(0)
    classes, channels = classes_and_channels(config)
    model = create_host(config.model, classes if args.top1 else 0, channels).eval()
    size = input_shape(model, config.model.img_size)
    data = resolve_data(config.data, dataset_info(config.data.dataset), model, config.model.pretrained, size)
    mode = "L" if data["input_size"][0] == 1 else "RGB"
    split = load_dataset(config.data.dataset, config.data.val_split, False, mode, config.data.root, {})
    test = SeededDataset(split, eval_transform(data), 0)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(1))
    unseen = [torch.stack([test[0, int(i)][0] for i in part]) for part in order[: args.eval_images].split(16)]
    loader = DataLoader(test, batch_size=128, sampler=[(0, int(i)) for i in order[: args.top1_images]])
    calibration = list(calibration_images(config.data, data, args.images, 16, 0))
    reference = features(model, unseen)
    if args.top1:
        yield {"case": "dense", "conversion": "", "share": 1.0, "cosine": 1.0, "top1": top1(model, loader)}
    for case in cases(args.ranks, args.peers):
        for column, options in COLUMNS.items():
            if column == "HOOI" and case.other is None:
                continue
            chosen = case.other if column == "HOOI" and case.other is not None else case.config
            chosen = chosen.model_copy(update={"calibration": options})
            started = time.perf_counter()
            torch.manual_seed(0)
            report = vt.patch(model, chosen, calibration=None if options is None else calibration)
            seconds = time.perf_counter() - started
            found = torch.cosine_similarity(features(model, unseen), reference, dim=-1).mean().item()
            row = {
                "case": case.name,
                "conversion": column,
                "share": report.params_after / report.params_before,
                "cosine": found,
                "top1": top1(model, loader) if args.top1 else None,
                "output_error": mean([x.output_error for x in report.layers]),
                "seconds": seconds,
            }
            vt.unpatch(model)
            yield row


def mean(values: list[float | None]) -> float | None:
    """Mean of the known values."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def table(rows: list[dict[str, Any]], metric: str) -> str:
    """Markdown: one line per case, one column per conversion."""
    lines = [f"| {metric} | parameters | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name in dict.fromkeys(row["case"] for row in rows if row["case"] != "dense"):
        mine = {row["conversion"]: row for row in rows if row["case"] == name}
        cells = [f"{mine[c][metric]:.{3 if metric == 'cosine' else 2}f}" if c in mine else "" for c in COLUMNS]
        lines.append(f"| {name} | {next(iter(mine.values()))['share']:.1%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The tables, and under which circumstances they were measured."""
    text = "\n\n".join(table(rows, metric) for metric in (["cosine", "top1"] if args.top1 else ["cosine"]))
    if args.top1:
        text += f"\n\ndense top1: {rows[0]['top1']:.2f} on {args.top1_images} test images"
    return (
        f"{text}\n\n{args.images} calibration images, {args.eval_images} others for the cosine; {date.today()}, "
        f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} CPU threads"
    )


def write(folder: Path, rows: list[dict[str, Any]], text: str) -> None:
    """results.csv and results.md, again after each row: a run of half an hour may be stopped."""
    (folder / "results.md").write_text(text + "\n")
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["case", "conversion", "share", "cosine", "top1", "output_error", "seconds"])
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, help="run config: model, weights and data")
    parser.add_argument(
        "--ranks", default="6,128,128 6,64,64 6,32,32 6,16,16 4,64,64 4,32,32", help="triples, spaces between"
    )
    parser.add_argument("--peers", default="gqa-mean:3 gqa-svd:3 mla:64", help="gqa-mean:G, gqa-svd:G, mla:RANK")
    parser.add_argument("--images", type=int, default=64, help="calibration images, from the training set")
    parser.add_argument("--eval-images", type=int, default=64, help="test images for the cosine")
    parser.add_argument("--top1", action="store_true", help="also the accuracy: the weights must have a trained head")
    parser.add_argument("--top1-images", type=int, default=4000)
    parser.add_argument("--save", type=Path, help="folder for results.csv, results.md and config.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_intermixed_args()

    def run() -> int:
        config = load_config(args.cfg, args.overrides)
        if args.save is not None:
            args.save.mkdir(parents=True, exist_ok=True)
            checkpoint = config.model.model_copy(update={"checkpoint": Path(str(config.model.checkpoint)).name})
            (args.save / "config.yaml").write_text(dump_config(config.model_copy(update={"model": checkpoint})))
        rows: list[dict[str, Any]] = []
        for row in measure(args, config):
            rows.append(row)
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()), flush=True)
            if args.save is not None:
                write(args.save, rows, summary(rows, args))
        print(summary(rows, args))
        return 0

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
