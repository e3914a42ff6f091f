"""Spectra of attention tensors as a table and as a figure, from the files that ``python -m vit_tucker ranks`` writes."""

import ast
import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from vit_tucker.show.figures import grid, save, subplots
from vit_tucker.show.tables import markdown

PANELS = (("pre", "head"), ("pre", "query"), ("pre", "key"), ("post", "head"), ("post", "output"), ("post", "value"))
NUMBERS = ("effective_rank", "stable_rank", "rank_90", "rank_95", "rank_99", "numerical_rank")
FLOOR = 1e-4
"""Lower end of the figure's axis, relative to the largest singular value."""


def read_rows(file: Path) -> list[dict[str, str]]:
    """Reads the lines of a CSV file."""
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def rank_rows(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of a folder's ranks.csv as values: numbers where they are some."""
    return [{key: _value(text) for key, text in row.items()} for row in read_rows(folder / "ranks.csv")]


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def rank_summary(folder: Path) -> str:
    """Returns a Markdown table of a folder's ranks.csv: for each mode the ranks' means over layers, smallest and largest."""
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = defaultdict(list)
    for row in read_rows(folder / "ranks.csv"):
        groups[row["whitened"], row["tensor"], row["mode"]].append(row)
    lines = []
    for (whitened, tensor, mode), rows in groups.items():
        cells = []
        for name in NUMBERS:
            values = [float(row[name]) for row in rows]
            cells.append(f"{sum(values) / len(values):.1f} ({min(values):.4g}-{max(values):.4g})")
        label = f"{tensor}, whitened" if whitened == "True" else tensor
        lines.append([label, mode, rows[0]["size"], *cells])
    header = ["tensor", "mode", "size", *(name.replace("_", " ") for name in NUMBERS)]
    return markdown(header, lines, aligned=False, colons=False)


def draw_spectra(
    folder: Path, whitened: bool = False, gqa: tuple[int, ...] | None = None, mla: tuple[int, ...] | None = None
) -> Path:
    """Writes ``spectra_figure`` of the files in a folder as spectra.png and spectra.pdf (spectra_whitened.*) beside them.

    Args:
        folder, whitened, gqa, mla: see ``spectra_figure``.

    Returns:
        The PNG file.
    """
    figure = spectra_figure(folder, whitened, gqa, mla)
    return folder / save(figure, folder, f"spectra{'_whitened' * whitened}", dpi=200)


def spectra_figure(
    folder: Path, whitened: bool = False, gqa: tuple[int, ...] | None = None, mla: tuple[int, ...] | None = None
) -> Figure:
    """Draws the decay of each mode's singular values over the depth of the model, and the ranks that GQA and MLA reach at most.

    Args:
        folder: with layers.csv and singular_values.csv.
        whitened: draw the whitened spectra.
        gqa: numbers of key/value heads to mark, rank G * head_dim of keys and values; a half and one if None.
        mla: latent widths to mark, ranks of queries, keys and values; a quarter of embed_dim if None.
    """
    layers = read_rows(folder / "layers.csv")
    depth = {row["layer"]: number for number, row in enumerate(layers)}
    curves: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(folder / "singular_values.csv"):
        if row["whitened"] == str(whitened):
            curves[row["tensor"], row["mode"]][row["layer"]].append(float(row["value"]))
    heads, width, dim = (int(layers[0][name]) for name in ("num_heads", "head_dim", "embed_dim"))
    gqa = tuple(dict.fromkeys((max(1, heads // 2), 1))) if gqa is None else gqa
    mla = (max(1, dim // 4),) if mla is None else mla
    colours = colormaps["viridis"]
    last = max(1, len(layers) - 1)
    with subplots(7.2, 4.2, 2, 3, sharey=True) as (figure, axes):
        for axis, (tensor, mode) in zip(axes.flat, PANELS, strict=True):
            for layer, values in curves[tensor, mode].items():
                relative = [value / values[0] if values[0] > 0 else 0.0 for value in values]
                # a head mode of few values is read by its points
                style = {"marker": "o", "markersize": 2.5} if len(values) <= 32 else {}
                colour = colours(0.92 * depth[layer] / last)
                axis.plot(range(1, len(values) + 1), relative, color=colour, linewidth=0.9, **style)
            mark_limits(axis, mode, heads, width, gqa, mla)
            axis.set_yscale("log")
            axis.set_ylim(FLOOR, 1.5)
            axis.set_title(f"{tensor}-softmax, {mode} mode")
            grid(axis)
        for axis in axes[:, 0]:
            axis.set_ylabel("singular value / largest")
        for axis in axes[1]:
            axis.set_xlabel("index")
        scale = ScalarMappable(Normalize(0, last / 0.92), colours)
        bar = figure.colorbar(scale, ax=axes, shrink=0.7, pad=0.01, boundaries=[last * i / 100 for i in range(101)])
        bar.set_ticks([0, last])
        bar.set_label("layer", labelpad=-6)
        return figure


def mark_limits(axis: Any, mode: str, heads: int, width: int, gqa: tuple[int, ...], mla: tuple[int, ...]) -> None:
    """Draws vertical lines where GQA and MLA end: their tensors have no singular values beyond.

    Args:
        axis: of a figure.
        mode: name of the mode.
        heads, width: number of heads, and columns of each.
        gqa: numbers of key/value heads to mark.
        mla: latent widths to mark.
    """
    marks: dict[int, list[str]] = {}
    if mode == "head":
        marks[heads] = ["MHA, GQA, MLA"]
    if mode in ("query", "key", "value"):
        for latent in mla:
            marks.setdefault(latent, []).append(f"MLA-{latent}")
    if mode in ("key", "value"):
        for groups in gqa:
            marks.setdefault(groups * width, []).append(f"GQA-{groups}")
    for number, (rank, labels) in enumerate(sorted(marks.items())):
        axis.axvline(rank, color="tab:red", linewidth=0.8, linestyle="--")
        low, high = axis.get_xlim()
        left = rank > (low + high) / 2  # on the side that has room
        axis.annotate(", ".join(labels), (rank, 0.04 + 0.09 * number), xycoords=("data", "axes fraction"),
                      xytext=(-2 if left else 2, 0), textcoords="offset points", fontsize=6, color="tab:red",
                      ha="right" if left else "left",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8})  # fmt: skip
