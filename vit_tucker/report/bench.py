"""Throughput of models side by side, as people read it."""

from collections.abc import Mapping, Sequence
from typing import Any

from vit_tucker.show.tables import markdown


def bench_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the main columns of ``vit_tucker.inference.bench.bench``, in Markdown."""
    kinds = [kind for kind in ("infer", "train") if f"{kind}_step_time" in rows[0]]
    header = ["model", "params M", "attention params", "GMACs"]
    for kind in kinds:
        header += [f"{kind} images/s", f"{kind} ms", f"{kind} speed"]
    cells = []
    for row in rows:
        gmacs = "-" if row["infer_gmacs"] is None else f"{row['infer_gmacs']:.3f}"
        line = [row["model"], f"{row['param_count']:.2f}", f"{row['attention_params']:,}", gmacs]
        for kind in kinds:
            speed = "{:.2f}x ({:.2f}-{:.2f})".format(*(row[f"{kind}_speedup{end}"] for end in ("", "_low", "_high")))
            line += [f"{row[f'{kind}_samples_per_sec']:,.1f}", f"{row[f'{kind}_step_time']:.2f}", speed]
        cells.append(line)
    return markdown(header, cells, 1)
