"""One wide picture of all studies: accuracy over attention parameters, a panel for each, for light and for dark pages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from vit_tucker.report.figures import FAINT, draw_dense
from vit_tucker.report.sections import Section
from vit_tucker.report.settings import Setting
from vit_tucker.report.stats import pareto_front
from vit_tucker.show.figures import (
    DARK,
    LIGHT,
    Theme,
    grid,
    log_axis,
    save_svg,
    score_axis,
    subplots,
    themed,
)
from vit_tucker.show.methods import MethodDisplay

FILES = {"accuracy_params_light.svg": LIGHT, "accuracy_params_dark.svg": DARK}
COLUMNS, WIDTH, HEIGHT, LEGEND = 2, 3.0, 2.1, 0.3
"""Panels beside each other; inches of a panel and of the legend: letters are 13 pixels high where the picture is 800 wide."""


def write_overview(sections: Sequence[Section], folder: Path) -> list[str]:
    """Writes the picture for light and for dark pages as SVG files.

    Args:
        sections: those that compare at least two methods get a panel.
        folder: where to.

    Returns:
        Names of the files; none if no section compares methods.
    """
    drawn = [section for section in sections if len(section.methods) > 1]
    if not drawn:
        return []
    for name, theme in FILES.items():
        draw_overview(drawn, theme, folder / name)
    return list(FILES)


def draw_overview(sections: Sequence[Section], theme: Theme, file: Path) -> None:
    """Draws a panel for each section, with one legend, and writes it.

    Args:
        sections: one for each panel.
        theme: of the page.
        file: the SVG file.
    """
    columns = min(COLUMNS, len(sections))
    rows = -(-len(sections) // columns)
    with subplots(WIDTH * columns, HEIGHT * rows + LEGEND, rows, columns, theme, squeeze=False) as (figure, axes):
        labels: dict[str, Any] = {}
        for axis, section in zip(axes.flat, sections, strict=False):
            draw_panel(axis, section, theme)
            handles, names = axis.get_legend_handles_labels()
            labels = {**dict(zip(names, handles, strict=True)), **labels}
        for axis in axes.flat[len(sections) :]:
            axis.set_visible(False)
        for axis in axes[:, 1:].flat:
            axis.set_ylabel("")
        faded = Line2D([], [], color=theme.ink, marker="o", markersize=2.6, linestyle="none", alpha=FAINT)
        labels["not on its method's front"] = faded
        figure.legend(labels.values(), labels, loc="outside lower center", ncols=len(labels), frameon=False)
        save_svg(figure, file)


def draw_panel(axis: Any, section: Section, theme: Theme) -> None:
    """Draws the settings of one host and data set, a colour for each method, and the dense host.

    Args:
        axis: of a figure.
        section: of one host and data set.
        theme: of the page.
    """
    for method in section.methods:
        settings = [s for s in section.comparable if s.method == method]
        draw_method(axis, settings, section.displays[method], theme, f"{section.slug}-{method}")
    shown, costs = list(section.comparable), [s.params for s in section.comparable]
    if section.dense is not None:
        costs += draw_dense(axis, section.dense, lambda setting: setting.params, theme.ink, costs)
        shown.append(section.dense)
    log_axis(axis, min(costs), max(costs))
    axis.set_xlabel("attention parameters")
    axis.set_title(section.title)
    axis.patch.set_gid(f"{section.slug}-area")
    score_axis(axis, section.measures[0], min(s.score for s in shown), max(s.score for s in shown))
    axis.set_ylabel(f"{axis.get_ylabel()} ± std")
    grid(axis)


def draw_method(axis: Any, settings: Sequence[Setting], display: MethodDisplay, theme: Theme, gid: str) -> None:
    """Draws the Pareto front of one method over all its starts as a line, with error bars; its other settings faded.

    Args:
        axis: of a figure.
        settings: of the method.
        display: how it is shown.
        theme: of the page.
        gid: name of its line in the SVG file.
    """
    colour = themed(display.colour or theme.ink, theme)
    costs, means = np.array([s.params for s in settings]), np.array([s.score for s in settings])
    errors = np.array([s.score_std or 0.0 for s in settings])
    front = pareto_front(costs, np.array([s.merit for s in settings]))
    others = [i for i in range(len(settings)) if i not in front]
    style = {"color": colour, "marker": display.marker, "markeredgewidth": 0.6}
    axis.errorbar(costs[front], means[front], errors[front], linestyle="none", elinewidth=0.7, color=colour, alpha=0.55)
    axis.plot(costs[others], means[others], linestyle="none", markersize=2.6, alpha=FAINT, gid=f"{gid}-others", **style)
    axis.plot(costs[front], means[front], linewidth=1.2, markersize=4, label=display.name, gid=gid, zorder=3, **style)
