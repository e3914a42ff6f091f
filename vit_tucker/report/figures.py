"""Accuracy over cost, as Fig 3 of the paper: a curve per method and start, error bars over seeds, the dense host as a band."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_tucker.report.sections import Section
from vit_tucker.report.settings import Setting
from vit_tucker.report.stats import pareto_front
from vit_tucker.show.figures import COLUMN, FILLS, LINES, grid, log_axis, save, score_axis, subplots
from vit_tucker.show.methods import MethodDisplay
from vit_tucker.show.tables import short_count

Cost = Callable[[Setting], float | None]

COSTS: dict[str, tuple[str, Cost]] = {
    "params": ("attention parameters", lambda setting: setting.params),
    "flops": ("FLOPs per image", lambda setting: setting.flops),
    "latency": ("latency, ratio to dense", lambda setting: setting.latency),
}
"""By name in files: the axis label and the number."""
FAINT = 0.35
"""Opacity of settings off the front."""
FADED = "faded: not on its curve's front"
BARS = 0.55
"""Opacity of error bars."""
FAR, FEW = 0.25, 3
"""The dense host is left off a log axis where settings of so many costs would have less than this part of its width."""
HEIGHT, LINE, STRIP = 2.7, 0.14, 0.4
"""Inches: of a figure, of a method's quartiles below it, and of what surrounds them."""


def draw_accuracy(section: Section, cost: str, folder: Path) -> tuple[str | None, list[str]]:
    """Draws the score over a key of ``COSTS``, for settings of the common recipe, as accuracy_<cost> or perplexity_<cost>.

    Args:
        section: its settings and its dense host are drawn.
        cost: a key of ``COSTS``.
        folder: where to.

    Returns:
        The name of the PNG, beside which is a PDF, None if no setting has that cost; and a note on settings that lack it.
    """
    label, of = COSTS[cost]
    drawn = [s for s in section.comparable if of(s) is not None]
    missing = ", ".join(s.name for s in section.comparable if of(s) is None)
    if not drawn:
        return None, [f"No figure over {label}: no results have it."] if missing else []
    notes = [f"Not in the figure over {label}, which their results lack: {missing}."] if missing else []
    measured = cost == "latency"
    strip = STRIP + LINE * len({s.method for s in drawn}) if measured else 0.0
    ratios = [HEIGHT - 0.7, strip] if measured else None
    with subplots(COLUMN, HEIGHT + strip, 1 + measured, squeeze=False, height_ratios=ratios) as (figure, axes):
        axis = axes[0, 0]
        series = list(dict.fromkeys(s.series for s in drawn))
        faded = [
            draw_series(axis, [s for s in drawn if s.series == one], of, section.displays, series) for one in series
        ]
        if any(faded):
            axis.plot([], [], "o", color="black", alpha=FAINT, markersize=3.6, label=FADED)
        costs = [float(of(s) or 0.0) for s in drawn]
        if section.dense is not None:
            costs += draw_dense(axis, section.dense, of, costs=[] if measured else costs)
        if measured:
            draw_quartiles(axes[1, 0], drawn, section.displays)
        else:
            log_axis(axis, min(costs), max(costs))
        axis.set_xlabel(label)
        shown = [*drawn, *([] if section.dense is None else [section.dense])]
        means = [s.score for s in shown]
        score_axis(axis, section.measures[0], min(means), max(means))
        grid(axis)
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=2, frameon=False, handlelength=2.4, columnspacing=1.2
        )
        return save(figure, folder, f"{section.measures[0].stem}_{cost}"), notes


def draw_series(
    axis: Any, settings: list[Setting], of: Cost, displays: dict[str, MethodDisplay], series: list[tuple[str, str]]
) -> int:
    """Draws settings of one method and start, and a line with error bars through their Pareto front; those off it are faint.

    The line and the filling of the markers tell the start.

    Args:
        axis: of a figure.
        settings: of one method and start.
        of: their cost.
        displays: how methods are shown, by method.
        series: methods and starts of the figure.

    Returns:
        The number of faint ones.
    """
    method, init = settings[0].series
    display = displays[method]
    number = [start for name, start in series if name == method].index(init)
    style = {"color": display.colour, "marker": display.marker, "markersize": 3.6, "markeredgewidth": 0.8}
    style |= {"fillstyle": FILLS[number % len(FILLS)], "markerfacecoloralt": "white"}
    costs, means = np.array([of(s) or 0.0 for s in settings]), np.array([s.score for s in settings])
    errors = np.array([s.score_std or 0.0 for s in settings])
    front = pareto_front(costs, np.array([s.merit for s in settings]))
    others = [i for i in range(len(settings)) if i not in front]
    axis.plot(costs[others], means[others], linestyle="none", alpha=FAINT, zorder=2, **style)
    axis.errorbar(
        costs[front],
        means[front],
        errors[front],
        linestyle="none",
        elinewidth=0.6,
        color=display.colour,
        alpha=BARS,
        zorder=2,
    )
    name = display.name if init == "-" else f"{display.name}, {init}"
    axis.plot(costs[front], means[front], LINES[number % len(LINES)], linewidth=1.0, label=name, zorder=3, **style)
    return len(others)


def draw_quartiles(axis: Any, settings: list[Setting], displays: dict[str, MethodDisplay]) -> None:
    """Draws, for each method, the median setting's range of measured latencies: from the lowest to the highest quartile.

    Args:
        axis: of a figure.
        settings: with measured latencies.
        displays: how methods are shown, by method.
    """
    methods = list(dict.fromkeys(s.method for s in settings))
    for row, method in enumerate(methods):
        low, high = np.median([s.latency_range for s in settings if s.method == method], axis=0)
        axis.plot([low, high], [row, row], color=displays[method].colour, linewidth=2.0, solid_capstyle="butt")
    axis.axvline(1.0, color="black", linewidth=0.6, linestyle=(0, (4, 3)), zorder=1)
    axis.set_yticks(range(len(methods)), [displays[method].name for method in methods])
    axis.set_ylim(len(methods) - 0.5, -0.5)
    axis.set_xlabel("range of the measurements' quartiles, median over settings")
    grid(axis)


def draw_dense(axis: Any, dense: Setting, of: Cost, ink: str = "black", costs: Sequence[float] = ()) -> list[float]:
    """Draws the dense host as a star, its standard deviation as a band over the whole width.

    Args:
        axis: of the figure.
        dense: the host.
        of: its cost.
        ink: colour of star, line and band.
        costs: those of the settings on a log axis; where the host is far from them, the star stands at the right end and the
            legend has its cost.

    Returns:
        Its cost, nothing if it is unknown or off the axis.
    """
    mean, std, cost = dense.score, dense.score_std, of(dense)
    axis.axhline(mean, color=ink, linewidth=0.6, linestyle=(0, (4, 3)), zorder=1)
    if std is not None:
        axis.axhspan(mean - std, mean + std, color=ink, alpha=0.1, linewidth=0, zorder=0)
    star = {"marker": "*", "linestyle": "none", "color": ink, "markersize": 7, "zorder": 4}
    said = "" if std is None else "band: ± std"
    if cost is not None and is_far(cost, costs):
        said = f"at {short_count(cost)}{'; ' * bool(said)}{said}"
        axis.plot([1.0], [mean], transform=axis.get_yaxis_transform(), clip_on=False, label=f"dense ({said})", **star)
        return []
    position = [] if cost is None else [cost]
    axis.plot(position, [mean] * len(position), label=f"dense ({said})" if said else "dense", **star)
    return position


def is_far(cost: float, costs: Sequence[float]) -> bool:
    """Returns whether settings would be one strip of a log axis that also has the dense host's cost."""
    if len(set(costs)) < FEW:
        return False
    low, high = min(costs), max(costs)
    return bool(np.log(high / low) < FAR * np.log(max(high, cost) / min(low, cost)))
