"""As which width does torch's attention kernel compute narrow and odd heads fastest on this CPU?

    python benchmarks/widths.py --save benchmarks/results/head_widths [--shape 8x197x768x12] [--widths 4 8 ...]

All heads of a shape (batch x tokens x embed_dim x num_heads; embed_dim plays no part) share a key and a value of some width,
packed as backend sdpa packs them. Each width is timed as it is and padded with zeros to what vit_tucker chooses
(backends/padding.py), in turns: above 1, padding is faster. The copies that padding makes are counted.
Exit status: 0 measured, 2 bad arguments.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from attention_layers import EXAMPLE, Shape, parse_shape
from output import device_parser, save_tables, start
from torch import Tensor, nn
from torch.nn import functional as F
from turns import in_turns, inference, training

from vit_tucker.attention.backends.padding import cpu_width, pad
from vit_tucker.errors import VitTuckerError
from vit_tucker.show.tables import markdown

WIDTHS = (4, 8, 10, 12, 15, 16, 17, 18, 20, 22, 23, 24, 28, 30, 31, 32, 40, 48, 60, 62, 63, 64, 96, 126, 127, 128)
KINDS = ("forward", "step")
COLUMNS = (
    "width",
    "padded",
    *(f"{kind}_{what}" for kind in KINDS for what in ("ms", "padded_ms", "speedup", "25", "75")),
)


class Heads(nn.Module):
    """Attention of packed queries to one key and value.

    Args:
        key, value: (B, 1, N, D).
        width: to which all is padded.
    """

    def __init__(self, key: Tensor, value: Tensor, width: int) -> None:
        super().__init__()
        self.key, self.value = nn.Parameter(key), nn.Parameter(value)
        self.width = width

    def forward(self, q: Tensor) -> Tensor:
        """Returns outputs (B, 1, N*H, D) for queries (B, 1, N*H, D)."""
        query, key, value = (pad(t, self.width) for t in (q, self.key, self.value))
        return F.scaled_dot_product_attention(query, key, value, scale=0.1)[..., : q.shape[3]]


def measure(shape: Shape, width: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row: a width as it is, and padded."""
    torch.manual_seed(0)
    device, padded = torch.device(args.device), cpu_width(width)
    q = torch.randn(shape.batch, 1, shape.tokens * shape.heads, width, device=device)
    key, value = (torch.randn(shape.batch, 1, shape.tokens, width, device=device) for _ in range(2))
    row: dict[str, Any] = {"width": width, "padded": padded}
    for kind, call in zip(KINDS, (inference, training), strict=True):
        calls = {str(n): call(Heads(key, value, n), q, args.precision) for n in dict.fromkeys((width, padded))}
        timings = in_turns(calls, device, args.turns, args.seconds)
        own, best = timings[str(width)], timings[str(padded)]
        row |= {f"{kind}_ms": own.ms, f"{kind}_padded_ms": best.ms, f"{kind}_speedup": best.speedup,
                f"{kind}_25": best.low, f"{kind}_75": best.high}  # fmt: skip
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown for people."""
    header = ("width", "padded to", "forward ms", "padded", "speed-up", "step ms", "padded", "speed-up")
    cells = []
    for row in rows:
        parts = [str(row["width"]), str(row["padded"])]
        for kind in KINDS:
            parts += [f"{row[f'{kind}_ms']:.2f}", f"{row[f'{kind}_padded_ms']:.2f}",
                      f"{row[f'{kind}_speedup']:.2f} [{row[f'{kind}_25']:.2f}, {row[f'{kind}_75']:.2f}]"]  # fmt: skip
        cells.append(parts)
    return markdown(header, cells)


def main() -> int:
    """See the module."""
    parser = device_parser(__doc__)
    parser.add_argument("--shape", type=parse_shape, default=parse_shape(EXAMPLE))
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="widths.csv, widths.md")
    args = parser.parse_args()
    if args.compile or min(args.widths) < 1:
        parser.error("--compile plays no part here" if args.compile else "--widths: 1 at least")
    try:
        machine = start(args, [])
    except VitTuckerError as error:
        parser.error(str(error))
    rows = [measure(args.shape, width, args) for width in args.widths]
    text = f"### {args.shape}\n\n{table(rows)}"
    print(text)
    save_tables(args, "widths", COLUMNS, rows, text, machine)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
