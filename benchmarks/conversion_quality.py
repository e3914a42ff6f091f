"""How much of a trained model survives a conversion, without any training: weights alone against the tokens it sees.

    python benchmarks/conversion_quality.py --cfg benchmarks/configs/vit_s14_fashion_mnist.yaml model.checkpoint=FILE
    python benchmarks/conversion_quality.py --cfg fashion_mnist/dense --top1 model.checkpoint=runs/fashion_mnist-dense-0

All attention layers are converted. `cosine` compares the final features, token by token, with the dense model's on test images
that no conversion has seen; `output_error` is the layers' own, on dense inputs; `top1` is the accuracy on the test set. Columns
with chosen ranks spend the parameters of the row's ranks where they lower the error most. `--save FOLDER` writes CSV, table and
config.
"""

import argparse
import csv
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import vit_tucker as vt
from vit_tucker.attention.rope import spread_columns
from vit_tucker.attention.variants.tucker.layer import TuckerAttention
from vit_tucker.checkpoint.host_model import create_host
from vit_tucker.config.load import dump_config, load_config
from vit_tucker.config.schema import RunConfig
from vit_tucker.data.batches import SeededDataset, collate
from vit_tucker.data.datasets import dataset_info
from vit_tucker.data.samples import calibration_images
from vit_tucker.data.splits import open_split
from vit_tucker.data.transforms import eval_transform, resolve_data
from vit_tucker.hosts.find import find_attention
from vit_tucker.hosts.images import input_shape
from vit_tucker.run.model import classes_and_channels
from vit_tucker.run.status import guarded
from vit_tucker.tensor.tucker import hosvd

FEATURES = vt.Calibration()


@dataclass(frozen=True)
class Column:
    """One way to convert.

    Attributes:
        calibration: None: by the weights alone.
        hooi: by HOOI, Tucker only.
        chosen: ranks chosen by the budget that the given ones need, Tucker only.
        spread: hosts with RoPE as if nothing rotated, Tucker only.
    """

    calibration: vt.Calibration | None = None
    hooi: bool = False
    chosen: bool = False
    spread: bool = False

    def of(self, config: vt.AttentionConfig, share: float) -> vt.AttentionConfig | None:
        """The config, or None where there is no such thing."""
        update: dict[str, Any] = {"calibration": self.calibration}
        if self.chosen and share > 1:
            return None
        if isinstance(config, vt.TuckerConfig):
            update |= {"conversion": "hooi"} if self.hooi else {}
            update |= {"ranks": vt.RankRule(budget=share), "post_ranks": None} if self.chosen else {}
            if self.spread:
                return SpreadTuckerConfig(ranks=config.ranks)
        elif self.hooi or self.chosen or self.spread:
            return None
        return config.model_copy(update=update)


class SpreadTucker(TuckerAttention):
    """What a HOSVD that knows nothing of rotations makes of a host with RoPE: latent pairs spread evenly over its table."""

    def convert_from(self, weights: vt.MHAWeights) -> None:
        """See base class."""
        pre = hosvd(weights.pre_pairs(), self.ranks[0])
        missing = self.k_proj.in_features + (self.k_proj.bias is not None) - len(pre.right)
        pre = pre._replace(right=torch.nn.functional.pad(pre.right, (0, 0, 0, missing)))
        post = hosvd(weights.post_pairs(), self.ranks[1])
        rotations = spread_columns(self.k_proj.out_features, self.num_heads, self.head_dim)
        self.set_tensors(pre, post, weights.folded_out_bias(), rotations)


class SpreadTuckerConfig(vt.TuckerConfig):
    """See ``SpreadTucker``."""

    def build(self, spec: vt.HostSpec, **factory: Any) -> SpreadTucker:
        """See base class."""
        return SpreadTucker(spec, self.pre, self.post, **factory)


COLUMNS = {
    "weights": Column(),  # HOSVD, or the method's own conversion
    "HOOI": Column(hooi=True),
    "weights, rotations ignored": Column(spread=True),
    "layer": Column(FEATURES.model_copy(update={"objective": "layer"})),
    "features": Column(FEATURES),
    "features, refined": Column(FEATURES.model_copy(update={"refine_steps": 60})),
    "weights, chosen ranks": Column(chosen=True),
    "layer, chosen ranks": Column(FEATURES.model_copy(update={"objective": "layer"}), chosen=True),
    "features, chosen ranks": Column(FEATURES, chosen=True),
}
METRICS = {"cosine": ".3f", "output_error": ".3f", "top1": ".2f"}


def cases(ranks: str, peers: str) -> dict[str, vt.AttentionConfig]:
    """Tucker at the given rank triples, "8,16,16 8,32,32"; GQA and MLA beside them, "gqa-mean:2 gqa-svd:2 mla:64"."""
    rows: dict[str, vt.AttentionConfig] = {}
    for text in ranks.split():
        r1, r2, r3 = (int(part) for part in text.split(","))
        rows[f"Tucker ({r1},{r2},{r3})"] = vt.TuckerConfig(ranks=(r1, r2, r3))
    for text in peers.split():
        name, _, number = text.partition(":")
        if name == "mla":
            rows[f"MLA-{number}"] = vt.MLAConfig(q_lora_rank=int(number), kv_lora_rank=int(number))
            continue
        gqa = vt.GQAConfig(num_kv_heads=int(number)).model_copy(update={"conversion": name.removeprefix("gqa-")})
        rows[f"GQA-{number} {gqa.conversion}"] = gqa
    return rows


@torch.no_grad()
def features(model: Any, batches: Iterable[Tensor]) -> Tensor:
    """Final features of each token, (images, tokens, C)."""
    return torch.cat([model.forward_features(batch) for batch in batches])


@torch.no_grad()
def top1(model: nn.Module, loader: DataLoader) -> float:
    """Accuracy in percent."""
    hits = count = 0
    for images, labels, _ in loader:
        hits += int((model(images).argmax(1) == labels).sum())
        count += len(labels)
    return 100 * hits / count


@torch.no_grad()
def layer_calls(model: nn.Module, batch: Tensor) -> dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
    """Arguments and output of each dense attention layer on some images, by its name."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}
    handles = []
    for name, module in find_attention(model).items():

        def note(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, name: str = name
        ) -> None:
            calls[name] = (args, kwargs, output)

        handles.append(module.register_forward_hook(note, with_kwargs=True))
    model(batch)
    for handle in handles:
        handle.remove()
    return calls


@torch.no_grad()
def output_error(model: nn.Module, calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]]) -> float:
    """||y^ - y|| / ||y - mean y|| on the dense layers' inputs, mean over the layers."""
    errors = [
        ((model.get_submodule(name)(*args, **kwargs) - y).norm() / (y - y.mean((0, 1))).norm()).item()
        for name, (args, kwargs, y) in calls.items()
    ]
    return sum(errors) / len(errors)


def measure(args: argparse.Namespace, config: RunConfig) -> Iterator[dict[str, Any]]:
    """All rows and columns, one at a time."""
    torch.manual_seed(0)
    classes, channels = classes_and_channels(config)
    model = create_host(config.model, classes if args.top1 else 0, channels).eval()
    size = input_shape(model, config.model.img_size)
    data = resolve_data(config.data, dataset_info(config.data.dataset), model, config.model.is_trained, size)
    split = open_split(config.data, config.data.val_split, False, channels)
    test = SeededDataset(split, eval_transform(data), 0, config.data.val_split, replace=False)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(1))
    to_batch = partial(collate, shape=data["input_size"])
    unseen = [to_batch([test[0, int(i), 0] for i in part]).images for part in order[: args.eval_images].split(16)]
    keys = [(0, int(i), 0) for i in order[: args.top1_images]]
    loader = DataLoader(test, batch_size=128, sampler=keys, collate_fn=to_batch)
    calibration = list(calibration_images(config.data, data, args.images, 16, 0))
    reference, calls = features(model, unseen), layer_calls(model, unseen[0])
    if args.top1:
        yield {"case": "dense", "conversion": "", "share": 1.0, "cosine": 1.0, "top1": top1(model, loader)}
    for name, given in cases(args.ranks, args.peers).items():
        uniform = vt.plan(model, given)
        share = uniform.params_after / uniform.params_before
        for column in args.columns:
            chosen = COLUMNS[column].of(given, share)
            if chosen is None:
                continue
            started = time.perf_counter()
            torch.manual_seed(0)
            report = vt.patch(model, chosen, calibration=calibration if chosen.calibration is not None else None)
            seconds = time.perf_counter() - started
            found = torch.cosine_similarity(features(model, unseen), reference, dim=-1).mean().item()
            row = {
                "case": name,
                "conversion": column,
                "share": report.params_after / report.params_before,
                "cosine": found,
                "top1": top1(model, loader) if args.top1 else None,
                "output_error": output_error(model, calls),
                "seconds": seconds,
            }
            vt.unpatch(model)
            yield row


def table(rows: list[dict[str, Any]], metric: str, columns: list[str]) -> str:
    """Markdown: one line per case, one column per conversion."""
    lines = [f"| {metric} | parameters | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name in dict.fromkeys(row["case"] for row in rows if row["case"] != "dense"):
        mine = {row["conversion"]: row for row in rows if row["case"] == name}
        cells = [f"{mine[c][metric]:{METRICS[metric]}}" if c in mine else "" for c in columns]
        lines.append(f"| {name} | {next(iter(mine.values()))['share']:.1%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The tables, and under which circumstances they were measured."""
    metrics = [metric for metric in METRICS if metric != "top1" or args.top1]
    text = "\n\n".join(table(rows, metric, args.columns) for metric in metrics)
    if args.top1:
        text += f"\n\ndense top1: {rows[0]['top1']:.2f} on {args.top1_images} test images"
    return (
        f"{text}\n\n{args.images} calibration images, {args.eval_images} others for the cosine, 16 of these for the mean error "
        f"of the layers' outputs; {date.today()}, "
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
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS)[:5], help="which conversions")
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
