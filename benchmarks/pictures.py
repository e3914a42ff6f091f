"""The plot of the speed benchmarks: what was measured over what the operations promise."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from vit_tucker.show import figures


def draw_promise(rows: list[dict[str, Any]], file: Path) -> None:
    """Speed-ups of Tucker layers over the ratio of operations, one panel for each shape; the diagonal is the promise kept.

    Args:
        rows: see ``attention.py``.
        file: PNG.
    """
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    with figures.subplots(2.4 * len(shapes) + 0.3, 2.5, 1, len(shapes), squeeze=False) as (figure, axes):
        for axis, shape in zip(axes[0], shapes, strict=True):
            mine = [
                row for row in rows if row["shape"] == shape and row["layer"].startswith("Tucker") and "promise" in row
            ]
            draw_shape(axis, mine)
            axis.set(title=f"{shape}, {rows[0]['precision']}", xlabel="operations: dense / own")
        axes[0][0].set_ylabel("time: dense / own")
        axes[0][-1].legend(frameon=False)
        figure.savefig(file, dpi=200)


def draw_shape(axis: Any, rows: list[dict[str, Any]]) -> None:
    """One panel: rows of Tucker layers at one shape."""
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    for i, backend in enumerate(backends):
        points = sorted((row for row in rows if row["backend"] == backend), key=lambda row: row["promise"])
        for kind, fill, line, label in (("infer", "full", "-", "forward"), ("train", "none", "--", "training step")):
            middle, low, high = ([row[f"{kind}_speedup{end}"] for row in points] for end in ("", "_25", "_75"))
            bars = [
                [m - a for m, a in zip(middle, low, strict=True)],
                [b - m for m, b in zip(middle, high, strict=True)],
            ]
            axis.errorbar(
                [row["promise"] for row in points],
                middle,
                yerr=bars,
                marker=figures.SHAPES[i],
                color=figures.PALETTE[i],
                fillstyle=fill,
                linestyle=line,
                markersize=4,
                linewidth=0.8,
                label=f"{label}, {backend}" if len(backends) > 1 else label,
            )
    ends = [min(row["promise"] for row in rows) / 1.3, max(row["promise"] for row in rows) * 1.3] if rows else [1, 10]
    axis.plot(ends, ends, color="0.6", linewidth=0.8, zorder=0, label="promise kept")
    axis.axhline(1, color="0.8", linewidth=0.6, zorder=0)
    axis.set(xscale="log", yscale="log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(figures.LogLocator(subs=(1, 2, 5)))
        side.set_major_formatter(figures.FuncFormatter(lambda value, _: f"{value:g}"))
        side.set_minor_locator(figures.NullLocator())
    figures.grid(axis)


def draw_decoding(rows: list[dict[str, Any]], file: Path) -> None:
    """Speed-ups over cached tokens at batch 1, one panel for each part and shape; forms have one colour each.

    Args:
        rows: see ``decoding.py``.
        file: PNG.
    """
    alone = [row for row in rows if row["batch"] == 1 and row["part"] != "prefill" and row["cache"] == "static"]
    panels = list(dict.fromkeys((row["part"], row["shape"]) for row in alone))
    shapes = list(dict.fromkeys(shape for _, shape in panels))
    parts = list(dict.fromkeys(part for part, _ in panels))
    forms = list(dict.fromkeys(row["form"] for row in alone))
    with figures.subplots(2.4 * len(parts) + 0.3, 2.3 * len(shapes), len(shapes), len(parts), squeeze=False) as (
        figure,
        axes,
    ):
        for (i, shape), (j, part) in itertools.product(enumerate(shapes), enumerate(parts)):
            mine = [row for row in alone if (row["part"], row["shape"]) == (part, shape)]
            draw_forms(axes[i][j], mine, forms)
            axes[i][j].set(title=f"{part}, {shape}")
            axes[-1][j].set_xlabel("cached tokens")
            axes[i][0].set_ylabel("time: dense / own")
        axes[0][0].legend(frameon=False, fontsize=5)
        figure.savefig(file, dpi=200)


def draw_forms(axis: Any, rows: list[dict[str, Any]], forms: list[str]) -> None:
    """One panel: solid lines in float32, dashed ones in bfloat16."""
    for i, form in enumerate(forms):
        for precision, line in (("fp32", "-"), ("bf16", "--")):
            points = sorted((row["tokens"], row["speedup"]) for row in rows
                            if row["form"] == form and row["precision"] == precision)  # fmt: skip
            if points:
                label = form if precision == "fp32" else None
                colour, marker = figures.PALETTE[i % len(figures.PALETTE)], figures.SHAPES[i % len(figures.SHAPES)]
                axis.plot(*zip(*points, strict=True), line, color=colour, marker=marker, markersize=3, label=label)
    axis.axhline(1, color="0.8", linewidth=0.6, zorder=0)
    axis.set(xscale="log", yscale="log")
    figures.grid(axis)
