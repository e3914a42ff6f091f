"""Training curves over epochs, mean and spread over seeds, and the epochs in which a setting recovers dense accuracy."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from vit_tucker.errors import ConfigError, nearest
from vit_tucker.report.formats import Table, count, short_count
from vit_tucker.report.sections import Section
from vit_tucker.report.settings import DENSE, Setting, method_name
from vit_tucker.report.stats import Floats
from vit_tucker.report.style import FONTS, grid, save

POINTS = (5.0, 2.0, 1.0)
"""Percentage points below dense at which a setting counts as recovered, a column each."""
ROWS = (("eval_top1", "top-1 accuracy, %"), ("train_loss", "training loss"))


def curve_of(setting: Setting, key: str) -> tuple[list[int], Floats] | None:
    """Epochs, and values of one key of ``curve`` as (seeds, epochs); None where a run lacks them or ran for other epochs."""
    curves = [[row for row in run.get("curve") or [] if row.get(key) is not None] for run in setting.runs]
    epochs = [[int(row["epoch"]) for row in curve] for curve in curves]
    if not epochs[0] or any(other != epochs[0] for other in epochs):
        return None
    return epochs[0], np.array([[float(row[key]) for row in curve] for curve in curves])


def epochs_to_reach(setting: Setting, accuracy: float) -> int | None:
    """The first epoch at which the mean top-1 over seeds reaches an accuracy; None if it never does or there is no curve."""
    curve = curve_of(setting, "eval_top1")
    if curve is None:
        return None
    return next((epoch for epoch, value in zip(curve[0], curve[1].mean(0), strict=True) if value >= accuracy), None)


def recovery_table(section: Section) -> Table | None:
    """Epochs to come within some points of the dense mean; None without a dense setting or curves."""
    dense = section.dense
    settings = [s for s in section.comparable if curve_of(s, "eval_top1") is not None]
    if dense is None or not settings:
        return None
    header = ["config", "method", "options", "init", "attention params", *(f"dense - {points:g}" for points in POINTS)]
    rows, raw = [], []
    for setting in settings:
        reached = [epochs_to_reach(setting, dense.top1_mean - points) for points in POINTS]
        own = [setting.name, method_name(setting.method), setting.options, setting.init]
        rows.append([*own, count(setting.params), *(f">{setting.epochs}" if e is None else str(e) for e in reached)])
        raw.append([*own, setting.params, *reached])
    notes = [
        "The first epoch after which the mean top-1 over seeds is at most so many points below that of dense after its last "
        f"epoch ({dense.top1_mean:.2f}%); `>n`: not in n epochs.",
    ]
    raw_header = [
        "config",
        "method",
        "options",
        "init",
        "attention_params",
        *(f"dense_minus_{points:g}" for points in POINTS),
    ]
    return Table("recovery", header, rows, 4, raw_header, raw, notes)


def choose(settings: Sequence[Setting], patterns: Sequence[str]) -> list[Setting]:
    """Settings whose config's name matches one of the patterns; all without patterns.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(s.name, pattern) for s in settings):
            raise ConfigError(f"--curves {pattern}: no such config{nearest(pattern, [s.name for s in settings])}")
    return [s for s in settings if not patterns or any(fnmatchcase(s.name, pattern) for pattern in patterns)]


def draw_curves(section: Section, folder: Path, patterns: Sequence[str] = ()) -> str | None:
    """Top-1 and training loss over epochs, a column per method and start, as curves.png and .pdf.

    Args:
        section: its settings of the common recipe, and dense.
        folder: where to.
        patterns: names of configs, with wildcards; all if empty.

    Returns:
        The name of the PNG, None if no setting has a curve.
    """
    drawn = [s for s in choose(section.comparable, patterns) if curve_of(s, "eval_top1") is not None]
    if not drawn:
        return None
    series = list(dict.fromkeys(s.series for s in drawn))
    scale = ScalarMappable(
        LogNorm(min(s.params for s in drawn) * 0.98, max(s.params for s in drawn) * 1.02), "viridis_r"
    )
    with plt.rc_context(FONTS):
        figure, axes = plt.subplots(len(ROWS), len(series), figsize=(1.1 + 1.65 * len(series), 3.2), sharex=True, sharey="row",
                                    squeeze=False, layout="constrained")  # fmt: skip
        for column, (method, init) in enumerate(series):
            axes[0, column].set_title(f"{method_name(method)}, {init}")
            axes[-1, column].set_xlabel("epoch")
            axes[-1, column].xaxis.set_major_locator(MaxNLocator(5, integer=True))
            for row, (key, label) in enumerate(ROWS):
                axis = axes[row, column]
                for setting in (s for s in drawn if s.series == (method, init)):
                    draw_curve(axis, setting, key, {"color": scale.to_rgba(setting.params)})
                if section.dense is not None and not section.differences(section.dense):
                    draw_curve(axis, section.dense, key, {"color": "black", "linestyle": "--", "label": DENSE})
                grid(axis)
                if column == 0:
                    axis.set_ylabel(label)
        if axes[0, 0].get_legend_handles_labels()[1]:
            axes[0, 0].legend(frameon=False, loc="lower right")
        bar = figure.colorbar(scale, ax=axes, pad=0.01, aspect=40)
        sizes = spaced([s.params for s in drawn])
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.set_ticks(sizes)
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        bar.set_label("attention parameters")
        return save(figure, folder, "curves")


def draw_curve(axis: Any, setting: Setting, key: str, style: dict[str, Any]) -> None:
    """The mean over seeds as a line, mean ± sample standard deviation as a band."""
    curve = curve_of(setting, key)
    if curve is None:
        return
    epochs, values = curve
    means = values.mean(0)
    axis.plot(epochs, means, linewidth=0.9, **style)
    if len(values) > 1:
        spread = values.std(0, ddof=1)
        axis.fill_between(epochs, means - spread, means + spread, color=style["color"], alpha=0.15, linewidth=0)


def spaced(values: Sequence[float], least: float = 1.2) -> list[float]:
    """Some of the values, each at least so many times the one before."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value >= kept[-1] * least:
            kept.append(value)
    return kept
