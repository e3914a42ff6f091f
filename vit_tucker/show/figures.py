"""The style of all figures: colours that colour-blind readers can tell apart, markers, sizes, files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from vit_tucker.show.fonts import installed_fonts
from vit_tucker.show.measures import Measure
from vit_tucker.show.tables import short_count


class Theme(NamedTuple):
    """The page that a figure is for, as two colours."""

    background: str
    ink: str


LIGHT, DARK = Theme("#ffffff", "#000000"), Theme("#0d1117", "#e6edf3")
"""Paper, and GitHub's dark pages."""
PAGE = ("figure.facecolor", "axes.facecolor")
INK = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
"""Settings of matplotlib that are a theme's background, and its ink."""
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
    **dict.fromkeys(("font.size", "axes.labelsize", "axes.titlesize"), 7),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 6.5),
    "legend.fontsize": 6,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
FILES: dict[Any, Any] = {"pdf.fonttype": 42, "svg.hashsalt": "vit_tucker"}
"""Settings of matplotlib for files: fonts that journals accept, and the same bytes for the same data."""


@contextmanager
def subplots(
    width: float, height: float, rows: int = 1, columns: int = 1, theme: Theme = LIGHT, **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """Opens a figure in the project's style, and its axes; the style is in force within the context.

    The figure is none of pyplot's, which chooses a backend for the process.

    Args:
        width, height: of the figure, inches.
        rows, columns: of axes.
        theme: of the page that it is for.
        options: of ``Figure.subplots``.
    """
    page: dict[Any, Any] = {**dict.fromkeys(PAGE, theme.background), **dict.fromkeys(INK, theme.ink)}
    with rc_context({**FONTS, **page}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, **options)


def log_axis(axis: Any, low: float, high: float) -> None:
    """Makes x a log axis whose ticks read 20k, 50k, 100k, with as many of them as fit.

    Args:
        axis: of a figure whose data are drawn.
        low, high: ends of the data.
    """
    axis.set_xscale("log")
    digits = next(digits for ratio, digits in TICK_DIGITS if high / low < ratio)
    equal = MaxNLocator(6, steps=[1, 2, 5, 10])
    axis.xaxis.set_major_locator(LogLocator(subs=digits, numticks=20) if digits else equal)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axis.xaxis.set_minor_locator(NullLocator())


def accuracy_axis(axis: Any, low: float, high: float, horizontal: bool = False) -> None:
    """Makes y an axis in percent; where errors differ much, their log scale spreads what is close to 100%.

    Args:
        axis: of a figure whose data are drawn.
        low, high: the accuracies.
        horizontal: make it x.
    """
    name = "x" if horizontal else "y"
    axis.set(**{f"{name}label": "top-1 accuracy, %"})
    floor = 0.05
    least, most = max(100 - high, floor), max(100 - low, floor)
    if most < WIDE * least:
        return
    functions = (lambda a: -np.log(np.maximum(100 - a, floor)), lambda y: 100 - np.exp(-y))
    getattr(axis, f"set_{name}scale")("function", functions=functions)
    axis.set(**{f"{name}lim": (100 - min(most * 1.25, 100), 100 - least / 1.25)})
    ticks = [tick for tick in ACCURACY_TICKS if least / 1.25 <= 100 - tick <= most * 1.25]
    along = axis.xaxis if horizontal else axis.yaxis
    along.set_major_locator(FixedLocator(ticks))
    along.set_minor_locator(NullLocator())
    along.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set(**{f"{name}label": "top-1 accuracy, % (log error)"})


def score_axis(axis: Any, measure: Measure, low: float, high: float, horizontal: bool = False) -> None:
    """Makes y an axis of a measure: see ``accuracy_axis`` for one in percent; a perplexity's is logarithmic where it varies much.

    Args:
        axis: of a figure whose data are drawn.
        measure: what is drawn.
        low, high: its values.
        horizontal: make it x.
    """
    if measure.unit:
        accuracy_axis(axis, low, high, horizontal)
        return
    name = "x" if horizontal else "y"
    axis.set(**{f"{name}label": measure.label})
    if high > WIDE * low > 0:
        getattr(axis, f"set_{name}scale")("log")


def sizes_scale(sizes: Sequence[float]) -> Any:
    """Returns colours by size, on a log scale, without the light yellow that is not visible on white."""
    colours = colormaps["viridis_r"](np.linspace(0.12, 1.0, 256))
    return ScalarMappable(LogNorm(min(sizes) * 0.98, max(sizes) * 1.02), ListedColormap(colours))


def sizes_bar(figure: Figure, scale: Any, axes: Any, sizes: Sequence[float], label: str) -> None:
    """Adds the colour bar of ``sizes_scale``, with ticks at the sizes themselves where there is room.

    Args:
        figure: that it is added to.
        scale: see ``sizes_scale``.
        axes: that it stands beside.
        sizes: the sizes in the figure.
        label: of the bar.
    """
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


def luminance(colour: str) -> float:
    """Returns the relative luminance of an sRGB colour, 0 to 1, as WCAG defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one: str, other: str) -> float:
    """Returns the contrast of two colours, 1 to 21, as WCAG defines it."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def themed(colour: str, theme: Theme) -> str:
    """Returns a colour mixed with the theme's ink until it has the contrast that it has on white: black becomes the ink."""
    wanted = min(contrast(colour, LIGHT.background), contrast(theme.ink, theme.background))
    ink, own = np.array(to_rgb(theme.ink)), np.array(to_rgb(colour))
    mixtures = (to_hex(part * ink + (1 - part) * own) for part in np.linspace(0, 1, 21))
    return next((mixture for mixture in mixtures if contrast(mixture, theme.background) >= wanted), theme.ink)


def save(figure: Figure, folder: Path, stem: str, dpi: int = 300) -> str:
    """Writes PNG and PDF, the same bytes for the same data; returns the name of the PNG file.

    Args:
        figure: to write.
        folder: where to.
        stem: name of both files without the ending.
        dpi: dots per inch of the PNG.
    """
    with rc_context(FILES), installed_fonts(figure):
        figure.savefig(folder / f"{stem}.png", dpi=dpi, metadata={"Software": None})
        figure.savefig(folder / f"{stem}.pdf", metadata={"CreationDate": None})
    return f"{stem}.png"


def save_svg(figure: Figure, file: Path) -> None:
    """Writes SVG, the same bytes for the same data, without the date and the version of matplotlib."""
    with rc_context(FILES), installed_fonts(figure):
        figure.savefig(file, metadata={"Date": None, "Creator": None})
