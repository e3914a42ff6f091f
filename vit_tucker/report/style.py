"""How the figures look: colours that colour-blind readers can tell apart, markers, sizes, files."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from vit_tucker.report.formats import short_count

COLUMN = 3.4
"""Width of a column of a paper, inches."""
COLOURS = {"tucker": "#0072B2", "gqa": "#D55E00", "mla": "#009E73", "mha": "#000000", "dense": "#000000"}
OTHER_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9", "#999999")
"""The rest of Okabe and Ito's colours, for methods of others."""
MARKERS = {"tucker": "o", "gqa": "s", "mla": "^", "mha": "D", "dense": "*"}
OTHER_MARKERS = ("v", "P", "X", "d")
TICK_DIGITS = ((6.0, (1, 2, 3, 5, 7)), (40.0, (1, 2, 5)), (200.0, (1, 3)), (float("inf"), (1,)))
"""First digits of a log axis' ticks, by the ratio of its ends."""
LINES = ("-", "--", ":", "-.")
FONTS = {
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


def colour(method: str, methods: list[str]) -> str:
    """Of a method; ``methods`` are all of the figure."""
    others = [m for m in methods if m not in COLOURS]
    return COLOURS.get(method) or OTHER_COLOURS[others.index(method) % len(OTHER_COLOURS)]


def marker(method: str, methods: list[str]) -> str:
    """Of a method; ``methods`` are all of the figure."""
    others = [m for m in methods if m not in MARKERS]
    return MARKERS.get(method) or OTHER_MARKERS[others.index(method) % len(OTHER_MARKERS)]


def log_axis(axis: Any, low: float, high: float) -> None:
    """A log axis of x whose ticks read 20k, 50k, 100k, with as many of them as fit."""
    axis.set_xscale("log")
    digits = next(digits for ratio, digits in TICK_DIGITS if high / low < ratio)
    axis.xaxis.set_major_locator(LogLocator(subs=digits, numticks=20))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axis.xaxis.set_minor_locator(NullLocator())


def grid(axis: Any) -> None:
    """A light grid behind the data."""
    axis.grid(alpha=0.3, linewidth=0.4)
    axis.set_axisbelow(True)


def save(figure: Figure, folder: Path, stem: str) -> str:
    """Write PNG and PDF, the same bytes for the same data; the name of the PNG file."""
    figure.savefig(folder / f"{stem}.png", dpi=300)
    figure.savefig(folder / f"{stem}.pdf", metadata={"CreationDate": None})
    plt.close(figure)
    return f"{stem}.png"
