"""Training curves over epochs, mean and spread over seeds, and the epochs in which a setting recovers dense accuracy."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from vit_tucker.errors import ConfigError, nearest
from vit_tucker.report.sections import Section
from vit_tucker.report.settings import DENSE, Setting
from vit_tucker.report.stats import Floats
from vit_tucker.show.figures import grid, save, sizes_bar, sizes_scale, subplots
from vit_tucker.show.tables import Table, count

POINTS = (5.0, 2.0, 1.0)
"""Percentage points below dense at which a setting counts as recovered, a column each."""
COLUMNS = 4
"""Panels beside each other at most; more go below, as many in each row."""
LOSS = ("train_loss", "training loss")


def curve_rows(settings: Sequence[Setting]) -> tuple[tuple[str, str], ...]:
    """Returns the rows of a figure of curves: key and label of the score, and of the training loss."""
    measure = settings[0].measures[0]
    return (measure.column, "top-1 accuracy, %" if measure.unit else measure.label), LOSS


def curve_of(setting: Setting, key: str) -> tuple[list[int], Floats] | None:
    """Returns epochs, and values of one key of ``curve`` as (seeds, epochs); None where a run lacks them or has other epochs."""
    curves = [[row for row in run.get("curve") or [] if row.get(key) is not None] for run in setting.runs]
    epochs = [[int(row["epoch"]) for row in curve] for curve in curves]
    if not epochs[0] or any(other != epochs[0] for other in epochs):
        return None
    return epochs[0], np.array([[float(row[key]) for row in curve] for curve in curves])


def has_course(settings: Sequence[Setting]) -> bool:
    """Returns whether some setting was evaluated at more than one epoch, so that there is a curve to draw."""
    curves = [curve_of(setting, key) for setting in settings for key, _ in curve_rows(settings)]
    return any(curve is not None and len(curve[0]) > 1 for curve in curves)


def epochs_to_reach(setting: Setting, accuracy: float) -> int | None:
    """Returns the first epoch at which the mean top-1 over seeds reaches an accuracy; None if none does or there is no curve."""
    curve = curve_of(setting, "eval_top1")
    if curve is None:
        return None
    return next((epoch for epoch, value in zip(curve[0], curve[1].mean(0), strict=True) if value >= accuracy), None)


def recovery_table(section: Section) -> Table | None:
    """Returns epochs to come within some points of the dense accuracy; None without, or without curves of several epochs."""
    dense = section.dense
    settings = [s for s in section.comparable if curve_of(s, s.measures[0].column) is not None]
    if dense is None or section.measures[0].lowest or not has_course(settings):
        return None
    header = ["config", "method", "options", "init", "attention params", *(f"dense - {points:g}" for points in POINTS)]
    rows, raw = [], []
    for setting in settings:
        reached = [epochs_to_reach(setting, dense.score - points) for points in POINTS]
        own = [setting.name, setting.display.name, setting.options, setting.init]
        rows.append([*own, count(setting.params), *(f">{setting.epochs}" if e is None else str(e) for e in reached)])
        raw.append([*own, setting.params, *reached])
    notes = [
        "The first epoch after which the mean top-1 over seeds is at most so many points below that of dense after its last "
        f"epoch ({dense.score:.2f}%); `>n`: not in n epochs.",
    ]
    raw_header = [name.replace(" - ", "_minus_").replace(" ", "_") for name in header]
    return Table(header, rows, 4, raw_header, raw, notes, stem="recovery")


def check_patterns(patterns: Sequence[str], parts: Sequence[Section]) -> None:
    """Raises ConfigError for a pattern that matches no config's name in any section."""
    names = [setting.name for section in parts for setting in section.settings]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"--curves {pattern}: no such config{nearest(pattern, names)}")


def draw_curves(section: Section, folder: Path, patterns: Sequence[str] = ()) -> str | None:
    """Draws the score and training loss over epochs, a column per method and start, as curves.png and .pdf.

    Args:
        section: its settings of the common recipe, and dense, are drawn.
        folder: where to.
        patterns: names of configs, with wildcards; all if empty.

    Returns:
        The name of the PNG, None if no setting has a curve of several epochs.
    """
    chosen = [s for s in section.comparable if not patterns or any(fnmatchcase(s.name, p) for p in patterns)]
    drawn = [s for s in chosen if curve_of(s, s.measures[0].column) is not None]
    if not has_course(drawn):
        return None
    series, lines = list(dict.fromkeys(s.series for s in drawn)), curve_rows(drawn)
    blocks = -(-len(series) // COLUMNS)
    width = -(-len(series) // blocks)
    scale = sizes_scale([s.params for s in drawn])
    size, grid_of = (1.1 + 1.65 * width, 3.2 * blocks), (len(lines) * blocks, width)
    with subplots(*size, *grid_of, squeeze=False, sharex=True) as (figure, axes):
        for row, (key, label) in enumerate(lines):
            panels = [axes[len(lines) * (i // width) + row, i % width] for i in range(blocks * width)]
            for axis, one in zip(panels, series, strict=False):
                axis.sharey(panels[0])
                draw_panel(axis, section, [s for s in drawn if s.series == one], key, scale)
                axis.tick_params(labelbottom=True)
                if row == 0:
                    axis.set_title(f"{section.displays[one[0]].name}, {one[1]}")
                else:
                    axis.set_xlabel("epoch")
            for axis in panels:
                axis.set_ylabel(label if axis in axes[:, 0] else "")
            for axis in panels[len(series) :]:
                axis.set_visible(False)
        if axes[0, 0].get_legend_handles_labels()[1]:
            axes[0, 0].legend(frameon=False, loc="lower right")
        sizes_bar(figure, scale, axes, [s.params for s in drawn], "attention parameters")
        return save(figure, folder, "curves")


def draw_panel(axis: Any, section: Section, settings: Sequence[Setting], key: str, scale: Any) -> None:
    """Draws curves of one method and start, and dense where it has the same recipe.

    Args:
        axis: of a figure.
        section: the settings' section.
        settings: of the panel.
        key: of the rows of ``curve``.
        scale: colours by attention parameters.
    """
    for setting in settings:
        draw_curve(axis, setting, key, {"color": scale.to_rgba(setting.params)})
    if section.dense is not None and not section.differences(section.dense):
        draw_curve(axis, section.dense, key, {"color": "black", "linestyle": "--", "label": DENSE})
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    grid(axis)


def draw_curve(axis: Any, setting: Setting, key: str, style: dict[str, Any]) -> None:
    """Draws the mean over seeds as a line, mean ± sample standard deviation as a band.

    Args:
        axis: of a figure.
        setting: whose runs are averaged.
        key: of the rows of ``curve``.
        style: options of ``Axes.plot``, with the colour.
    """
    curve = curve_of(setting, key)
    if curve is None:
        return
    epochs, values = curve
    means = values.mean(0)
    axis.plot(epochs, means, linewidth=0.9, marker="" if len(epochs) > 1 else ".", **style)
    if len(values) > 1:
        spread = values.std(0, ddof=1)
        axis.fill_between(epochs, means - spread, means + spread, color=style["color"], alpha=0.15, linewidth=0)
