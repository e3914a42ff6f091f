"""How long is a training step of a LLaMA-shaped model with Tucker Attention, against its host with grouped-query attention?

    python benchmarks/lm_training_step.py --save benchmarks/results/lm_training_step [--dims 1024 2048] [--ranks 32 48 64 96]

The paper trains LLaMA-3 with iterations up to 20% shorter at 10 to 20% of the attention parameters of GQA. Here: random models of
--layers blocks, feed-forward part and a small head included, one text of --tokens tokens; a step is forward and backward pass and
an AdamW step. A speed-up is the host's time over the model's own in the same turn, median over turns, with quartiles, in one
process. Peak megabytes are what a step makes beside weights and the optimizer's state. Exit status: 0 measured, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from decoding_forms import Call
from output import device_parser, rounded, save_tables, start
from torch import Tensor, nn
from turns import DTYPES, in_turns

import vit_tucker as vt
from vit_tucker.analysis.interleaved import peak_bytes
from vit_tucker.errors import VitTuckerError
from vit_tucker.show.tables import markdown

COLUMNS = (
    *("dim", "form", "precision", "tokens", "attention_params", "attention_share", "params_share"),
    *("ms", "speedup", "speedup_25", "speedup_75", "peak_mb"),
)
HEAD_DIM, GROUP, HEAD_RANK, VOCABULARY = 64, 4, 8, 1000


def host(dim: int, layers: int) -> nn.Module:
    """Builds a random LLaMA of the proportions of LLaMA-3.2-1B: heads of width 64, four on each key."""
    heads = dim // HEAD_DIM
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=dim, intermediate_size=4 * dim, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // GROUP, head_dim=HEAD_DIM,
    ))  # fmt: skip


def models_of(dim: int, args: argparse.Namespace) -> dict[str, nn.Module]:
    """Builds the host and the same with Tucker Attention of each rank."""
    models, heads = {"GQA, transformers": host(dim, args.layers)}, min(HEAD_RANK, dim // HEAD_DIM)
    for rank in args.ranks:
        model = models[f"Tucker ({heads}, {rank}, {rank})"] = host(dim, args.layers)
        vt.patch(model, vt.TuckerConfig(ranks=(heads, rank, rank), init="random"))
    return {name: model.train() for name, model in models.items()}


def step_of(model: nn.Module, tokens: Tensor, precision: str) -> Call:
    """Returns a training step: forward and backward pass under autocast but for fp32, and an AdamW step.

    Args:
        model: of transformers.
        tokens: (B, N) of a text, which are its labels too.
        precision: of autocast.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    autocast = torch.autocast(tokens.device.type, DTYPES[precision], enabled=precision != "fp32")

    def step() -> None:
        with autocast:
            loss: Tensor = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def attention_size(model: Any) -> int:
    """Returns how many parameters a model's attention layers have."""
    return sum(p.numel() for block in model.model.layers for p in block.self_attn.parameters())


def measure(dim: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the rows of one width."""
    device = torch.device(args.device)
    models = {name: model.to(device) for name, model in models_of(dim, args).items()}
    tokens = torch.randint(VOCABULARY, (1, args.tokens), device=device)
    steps = {name: step_of(model, tokens, args.precision) for name, model in models.items()}
    first, rows = next(iter(models.values())), []
    for name, timing in in_turns(steps, device, args.turns, args.seconds).items():
        model = models[name]
        sizes = {"attention_params": attention_size(model), "attention_share": attention_size(model) / attention_size(first),
                 "params_share": count(model) / count(first)}  # fmt: skip
        speed = {"ms": timing.ms, "speedup": timing.speedup, "speedup_25": timing.low, "speedup_75": timing.high}
        facts = {"dim": dim, "form": name, "precision": args.precision, "tokens": args.tokens}
        rows.append(facts | sizes | speed | {"peak_mb": peak_bytes(steps[name], model.parameters(), device) / 1e6})
    print(table(rows), flush=True)
    return rows


def count(model: nn.Module) -> int:
    """Returns how many parameters a model has."""
    return sum(p.numel() for p in model.parameters())


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown for people."""
    header = ("d", "attention", "share of attention's parameters", "of all", "ms", "speed-up", "peak MB")
    return markdown(header, [
        [str(row["dim"]), row["form"], f"{row['attention_share']:.1%}", f"{row['params_share']:.1%}", f"{row['ms']:.0f}",
         f"{row['speedup']:.2f} [{row['speedup_25']:.2f}, {row['speedup_75']:.2f}]", f"{row['peak_mb']:.0f}"] for row in rows
    ])  # fmt: skip


def main() -> int:
    """See the module."""
    parser = device_parser(__doc__)
    parser.set_defaults(turns=7, seconds=0.0)
    parser.add_argument(
        "--dims", nargs="+", type=int, default=[1024, 2048], help="widths of the model, multiples of 256"
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[32, 64, 96], help="query/output and key/value ranks")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="lm_training_step.csv, .json and .md")
    args = parser.parse_args()
    if bad := [dim for dim in args.dims if dim % (HEAD_DIM * GROUP)]:
        parser.error(f"--dims {bad[0]}: a multiple of {HEAD_DIM * GROUP} is needed")
    try:
        machine = start(args, [])
    except VitTuckerError as error:
        parser.error(str(error))
    rows = [row for dim in args.dims for row in measure(dim, args)]
    save_tables(args, "lm_training_step", COLUMNS, rows, table(rows), machine)
    if args.save is not None:
        plain = [{key: rounded(value) for key, value in row.items()} for row in rows]
        (args.save / "lm_training_step.json").write_text(json.dumps(plain, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
