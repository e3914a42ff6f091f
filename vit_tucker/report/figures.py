"""Accuracy over cost, as Fig 3 of the paper: a curve per method and start, error bars over seeds, the dense host as a band."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vit_tucker.report.sections import Section
from vit_tucker.report.settings import Setting
from vit_tucker.report.stats import pareto_front
from vit_tucker.show.figures import COLUMN, FILLS, LINES, accuracy_axis, grid, log_axis, save, subplots
from vit_tucker.show.methods import MethodDisplay

Cost = Callable[[Setting], float | None]

COSTS: dict[str, tuple[str, Cost]] = {
    "params": ("attention parameters", lambda setting: setting.params),
    "flops": ("FLOPs per image", lambda setting: setting.flops),
    "latency": ("latency, ratio to dense", lambda setting: setting.latency),
}
"""By name in files: the axis label and the number."""
FAINT = 0.35
"""Opacity of settings off the front."""


def draw_accuracy(section: Section, cost: str, folder: Path) -> tuple[str | None, list[str]]:
    """Draws top-1 accuracy over a key of ``COSTS``, for settings of the common recipe, as accuracy_<cost>.png and .pdf.

    Returns:
        The name of the PNG, None if no setting has that cost; and a note on settings that lack it.
    """
    label, of = COSTS[cost]
    drawn = [s for s in section.comparable if of(s) is not None]
    missing = ", ".join(s.name for s in section.comparable if of(s) is None)
    if not drawn:
        return None, [f"No figure over {label}: no results have it."] if missing else []
    notes = [f"Not in the figure over {label}, which their results lack: {missing}."] if missing else []
    with subplots(COLUMN, 2.7) as (figure, axis):
        series = list(dict.fromkeys(s.series for s in drawn))
        for one in series:
            draw_series(axis, [s for s in drawn if s.series == one], of, section.displays, series)
        costs = [float(of(s) or 0.0) for s in drawn]
        if section.dense is not None:
            costs += draw_dense(axis, section.dense, of)
        if cost == "latency":
            draw_quartiles(axis, drawn, section.displays)
        else:
            log_axis(axis, min(costs), max(costs))
        axis.set_xlabel(label)
        shown = [*drawn, *([] if section.dense is None else [section.dense])]
        means = [s.top1_mean for s in shown]
        accuracy_axis(axis, min(means), max(means))
        grid(axis)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, handlelength=2.4, columnspacing=1.2)
        return save(figure, folder, f"accuracy_{cost}"), notes


def draw_series(
    axis: Any, settings: list[Setting], of: Cost, displays: dict[str, MethodDisplay], series: list[tuple[str, str]]
) -> None:
    """Draws settings of one method and start with error bars, and a line through their Pareto front; those off it are faint.

    The start is told by the line and by full, hollow or half markers.
    """
    method, init = settings[0].series
    display = displays[method]
    number = [start for name, start in series if name == method].index(init)
    style = {"color": display.colour, "marker": display.marker, "markersize": 3.6, "markeredgewidth": 0.8}
    style |= {"fillstyle": FILLS[number % len(FILLS)], "markerfacecoloralt": "white"}
    costs, means = np.array([of(s) or 0.0 for s in settings]), np.array([s.top1_mean for s in settings])
    errors = np.array([s.top1_std or 0.0 for s in settings])
    front = pareto_front(costs, means)
    others = [i for i in range(len(settings)) if i not in front]
    bars = {"linestyle": "none", "capsize": 1.3, "elinewidth": 0.7, "capthick": 0.7}
    axis.errorbar(costs[others], means[others], errors[others], alpha=FAINT, zorder=2, **bars, **style)
    axis.errorbar(costs[front], means[front], errors[front], zorder=4, **bars, **style)
    name = display.name if init == "-" else f"{display.name}, {init}"
    axis.plot(costs[front], means[front], LINES[number % len(LINES)], linewidth=1.0, label=name, zorder=3, **style)


def draw_quartiles(axis: Any, settings: list[Setting], displays: dict[str, MethodDisplay]) -> None:
    """Draws horizontal bars over the quartiles of measured latencies."""
    for s in settings:
        low, high = s.latency_range
        axis.plot([low, high], [s.top1_mean] * 2, color=displays[s.method].colour, linewidth=0.6, alpha=0.6, zorder=2)


def draw_dense(axis: Any, dense: Setting, of: Cost) -> list[float]:
    """Draws the dense host as a star, its standard deviation as a band over the whole width; returns its cost."""
    mean, std = dense.top1_mean, dense.top1_std
    axis.axhline(mean, color="black", linewidth=0.6, linestyle=(0, (4, 3)), zorder=1)
    if std is not None:
        axis.axhspan(mean - std, mean + std, color="black", alpha=0.1, linewidth=0, zorder=0)
    cost = of(dense)
    label = "dense" if std is None else "dense (band: ± std)"
    position = [] if cost is None else [cost]
    axis.plot(position, [mean] * len(position), "*", color="black", markersize=7, label=label, zorder=4)
    return position
