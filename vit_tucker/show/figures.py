"""How the figures look: colours that colour-blind readers can tell apart, markers, sizes, files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from vit_tucker.show.tables import short_count

COLUMN = 3.4
"""Width of a column of a paper, inches."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, for lines of any kind."""
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "p", "h", "d")
TICK_DIGITS = ((2.5, ()), (6.0, (1, 2, 3, 5, 7)), (40.0, (1, 2, 5)), (200.0, (1, 3)), (float("inf"), (1,)))
"""First digits of a log axis' ticks, by the ratio of its ends; none: ticks at equal distances, whatever their digits."""
ACCURACY_TICKS = (0, 30, 50, 60, 70, 80, 85, 90, 93, 95, 97, 98, 99, 99.3, 99.5, 99.7, 99.8, 99.9)
WIDE = 8.0
"""Errors that differ by more are drawn on a log scale."""
FILLS = ("full", "none", "left", "top", "right", "bottom")
LINES = ("-", "--", ":", "-.")
FONTS: dict[Any, Any] = {
    "font.size": 7,
    "axes.labelsize": 7,
    "axes.titlesize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
}


@contextmanager
def subplots(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """Context with a figure in our style, and its axes. It is none of pyplot's, which chooses a backend for the process.

    Args:
        width, height: inches.
        rows, columns: of axes.
        options: of ``Figure.subplots``.
    """
    with rc_context(FONTS):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, **options)


def log_axis(axis: Any, low: float, high: float) -> None:
    """Makes x a log axis whose ticks read 20k, 50k, 100k, with as many of them as fit."""
    axis.set_xscale("log")
    digits = next(digits for ratio, digits in TICK_DIGITS if high / low < ratio)
    equal = MaxNLocator(6, steps=[1, 2, 5, 10])
    axis.xaxis.set_major_locator(LogLocator(subs=digits, numticks=20) if digits else equal)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axis.xaxis.set_minor_locator(NullLocator())


def accuracy_axis(axis: Any, low: float, high: float) -> None:
    """Makes y an axis in percent; where errors differ much, their log scale spreads what is close to 100%.

    Args:
        axis: of a figure whose data are drawn.
        low, high: the accuracies.
    """
    axis.set_ylabel("top-1 accuracy, %")
    floor = 0.05
    least, most = max(100 - high, floor), max(100 - low, floor)
    if most < WIDE * least:
        return
    axis.set_yscale("function", functions=(lambda a: -np.log(np.maximum(100 - a, floor)), lambda y: 100 - np.exp(-y)))
    axis.set_ylim(100 - min(most * 1.25, 100), 100 - least / 1.25)
    axis.yaxis.set_major_locator(
        FixedLocator([tick for tick in ACCURACY_TICKS if least / 1.25 <= 100 - tick <= most * 1.25])
    )
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_ylabel("top-1 accuracy, % (log error)")


def sizes_scale(sizes: Sequence[float]) -> Any:
    """Returns colours by size, on a log scale, without the light yellow that is not visible on white."""
    colours = colormaps["viridis_r"](np.linspace(0.12, 1.0, 256))
    return ScalarMappable(LogNorm(min(sizes) * 0.98, max(sizes) * 1.02), ListedColormap(colours))


def sizes_bar(figure: Figure, scale: Any, axes: Any, sizes: Sequence[float], label: str) -> None:
    """Adds the colour bar of ``sizes_scale``, with ticks at the sizes themselves where there is room."""
    bar = figure.colorbar(scale, ax=axes, pad=0.01, aspect=30, shrink=0.6)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_ticks(spaced(sizes))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    bar.set_label(label)


def spaced(values: Sequence[float], least: float = 1.2) -> list[float]:
    """Returns some of the values, each at least so many times the one before."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value >= kept[-1] * least:
            kept.append(value)
    return kept


def grid(axis: Any) -> None:
    """Draws a light grid behind the data."""
    axis.grid(alpha=0.3, linewidth=0.4)
    axis.set_axisbelow(True)


def save(figure: Figure, folder: Path, stem: str) -> str:
    """Writes PNG and PDF, the same bytes for the same data; returns the name of the PNG file."""
    figure.savefig(folder / f"{stem}.png", dpi=300)
    figure.savefig(folder / f"{stem}.pdf", metadata={"CreationDate": None})
    return f"{stem}.png"
