"""Tables of costs: parameters, operations, memory and latency."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vit_tucker.show.tables import Table, count, decimal, share

FORMATS = {"markdown": ".md", "csv": ".csv", "latex": ".tex", "json": ".json"}
"""Formats, and the endings of their files."""


class Column(NamedTuple):
    """A column of a table of plain values.

    Attributes:
        key: its name in CSV and JSON files, where it holds plain values.
        title: its name elsewhere.
        show: how its values are written elsewhere.
    """

    key: str
    title: str
    show: Callable[[Any], str] = str


def in_units(unit: float, digits: int) -> Callable[[Any], str]:
    """Returns what writes numbers in a unit: 1_500_000 in 1e6 is '1.5'."""
    return lambda value: "-" if value is None else f"{value / unit:,.{digits}f}"


def or_dash(text: str | None) -> str:
    """Returns the text; '-' where there is none."""
    return text or "-"


FORMULA_COLUMNS = (
    Column("method", "method"),
    Column("sizes", "sizes"),
    Column("parameters_formula", "parameters"),
    Column("kv_formula", "KV cache"),
    Column("parameters", "by formula", count),
    Column("parameters_module", "of our layer", count),
    Column("kv_entries", "KV by formula", count),
    Column("kv_entries_module", "KV of our layer", count),
)
PUBLISHED_COLUMNS = (
    Column("row", "row"),
    Column("method", "method"),
    Column("attention", "attention"),
    Column("attention_model", "of the model", or_dash),
    Column("attention_published", "published", or_dash),
    Column("attention_deviation", "deviation"),
    Column("of_mha", "of MHA", share),
    Column("kv", "KV cache"),
    Column("kv_model", "of the model", or_dash),
    Column("kv_published", "published", or_dash),
    Column("kv_deviation", "deviation"),
)
MODEL_COLUMNS = (
    Column("attention", "attention"),
    Column("attention_params", "attention params", count),
    Column("of_dense", "of dense", share),
    Column("params", "all params", count),
    Column("attention_flops", "attention MFLOPs", in_units(1e6, 1)),
    Column("flops", "all MFLOPs", in_units(1e6, 1)),
    Column("activation_bytes", "activations MB", in_units(1e6, 2)),
    Column("kv_bytes", "KV kB", in_units(1e3, 1)),
)
LATENCY_COLUMNS = (
    Column("ms", "ms/batch", lambda value: decimal(value, 1)),
    Column("ratio", "time of dense", lambda value: decimal(value, 3)),
    Column("ratio_low", "25%", lambda value: decimal(value, 3)),
    Column("ratio_high", "75%", lambda value: decimal(value, 3)),
    Column("peak_bytes", "forward peak MB", in_units(1e6, 2)),
)


def value_table(
    title: str, columns: Sequence[Column], rows: Sequence[Sequence[Any]], text_columns: int, notes: Sequence[str]
) -> Table:
    """Returns a table of plain values, formatted by their columns.

    Args:
        title: one line above.
        columns: of the rows.
        rows: plain values.
        text_columns: how many of the first columns are text.
        notes: lines below.
    """
    cells = [[column.show(value) for column, value in zip(columns, row, strict=True)] for row in rows]
    header, keys = [column.title for column in columns], [column.key for column in columns]
    return Table(header, cells, text_columns, keys, rows, notes, title)


def formula_table(sizes: str, rows: Sequence[Sequence[Any]]) -> Table:
    """Returns Table 1: formulas, what they give, and what layers that were built have."""
    notes = (
        "parameters: of one attention layer, without biases",
        "letters: d embed_dim, H heads of width D = d / H, G key/value heads, c latent width, r1 r2 r3 ranks, N tokens",
        "of our layer: counted on the layer as built; KV: the numbers per token that later tokens need of it, times N",
    )
    title = f"Table 1: attention parameters and KV cache entries per layer, {sizes}"
    return value_table(title, FORMULA_COLUMNS, rows, 4, notes)


def published_table(title: str, rows: Sequence[Sequence[Any]], notes: Sequence[str]) -> Table:
    """Returns Table 2 or 3: formulas beside the printed numbers.

    Args:
        title: of the table.
        rows: cells in the order of ``PUBLISHED_COLUMNS``.
        notes: lines below the table.
    """
    legend = (
        "published: as the paper prints it; - where we do not know it",
        "deviation: equal: the formula's value rounds to the published one; cut: its further digits are dropped there; a number: "
        "published minus rounded value, for reasons that we do not know where no note says them",
    )
    return value_table(title, PUBLISHED_COLUMNS, rows, 2, (*notes, *legend))


def model_table(model: str, costs: Sequence[Mapping[str, Any]], precision: str, batch_size: int) -> Table:
    """Returns the table of a model with several methods, the dense one first.

    Args:
        model: its name.
        costs: of ``vit_tucker.run.costs.costs``, each ``to_dict()``.
        precision: "no", "bf16" or "fp16", of what was counted and measured.
        batch_size: images per step and per measured pass.
    """
    dense, latency = costs[0]["attention_params"], costs[0]["latency"]
    columns = MODEL_COLUMNS + (() if latency is None else LATENCY_COLUMNS)
    rows = []
    for cost in costs:
        of_dense = cost["attention_params"] / dense if dense else None
        values = {**cost, **(cost["latency"] or {}), "attention": cost["label"], "of_dense": of_dense}
        rows.append([values[column.key] for column in columns])
    bits = {"no": "float32"}.get(precision, precision)
    measured = any(cost["activation_bytes"] is not None for cost in costs)
    training = f"of a training step in {bits} with batch size {batch_size}, divided by it, with the CPU's kernels; "
    notes = [
        f"per {costs[0]['per']}; FLOPs: 2 per multiply-add, forward pass; attention params and FLOPs: of the self-attention "
        "layers",
        f"{f'activations: {training}' if measured else ''}MB are 10^6 bytes; KV: of all layers in {bits}",
    ]
    if latency is not None:
        notes.append(
            f"latency: forward pass in {bits}, batch size {batch_size}, on {latency['device']}, {latency['threads']} thread(s); "
            f"time of dense: to the dense model's in the same turn, median and quartiles of {latency['turns']} turns; peak: "
            "beyond model and images"
        )
    return value_table(f"{model}: cost of attention", columns, rows, 1, notes)
