"""Figures of accuracy against one option: lines over a few numbers, or a row for each group of settings."""

import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from vit_tucker.report.ablations import Line, categories, name_of, stem_of
from vit_tucker.show.figures import COLUMN, LINES, PALETTE, SHAPES, WIDE, grid, save, score_axis, subplots

TICK_WIDTH = 11
"""Letters of a word at a tick in a line."""
HEIGHT, LEGEND = 2.2, 0.13
"""Inches: of a figure of lines, and of a line of its legend."""
MOST_LINES = 6
"""Lines of one figure; more groups get a row each."""
ROW, AROUND, LETTER = 0.17, 0.75, 0.045
"""Inches: of a row with two values, of what is above and below the rows, and of a letter of their labels."""
APART = 0.34
"""Distance of two values in a row, in rows with two values."""


def draw_ablation(option: str, lines: Sequence[Line], folder: Path) -> str:
    """Draws accuracy against an option, and writes it; returns the name of the PNG.

    A few groups over numbers are lines with a legend. Many groups, or values that have no order, are rows with their labels
    beside them, and a colour for each value.

    Args:
        option: the key of the config, or several joined by commas.
        lines: groups of settings, see ``option_lines``.
        folder: where to.
    """
    ordered = all(re.fullmatch(r"[\d.e+-]+(, [\d.e+-]+)*", value) for value in categories(lines))
    draw = draw_lines if ordered and len(lines) <= MOST_LINES else draw_rows
    return draw(option, lines, folder)


def draw_lines(option: str, lines: Sequence[Line], folder: Path) -> str:
    """Draws a line for each group over the option's values.

    Args:
        option, lines, folder: see ``draw_ablation``.
    """
    values = categories(lines)
    numeric = not any("," in value for value in values)
    places = dict(zip(values, map(float, values if numeric else range(len(values))), strict=True))
    ticks = list(places.values())
    with subplots(COLUMN, HEIGHT + LEGEND * len(lines)) as (figure, axis):
        for i, line in enumerate(lines):
            style: dict[str, Any] = {"color": PALETTE[i % len(PALETTE)]}
            x, means = [places[value] for value in line.values], [s.score for s in line.settings]
            errors = [s.score_std or 0.0 for s in line.settings]
            axis.errorbar(x, means, errors, linestyle="none", elinewidth=0.6, alpha=0.6, **style)
            style |= {"marker": SHAPES[i % len(SHAPES)], "markersize": 3.6}
            axis.plot(x, means, LINES[i // len(PALETTE) % len(LINES)], linewidth=0.9, label=line.label, **style)
        if numeric and ticks[0] > 0 and ticks[-1] >= WIDE * ticks[0]:
            axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [fill(value, TICK_WIDTH) for value in values])
        axis.minorticks_off()
        axis.margins(x=0.08)
        axis.set_xlabel(name_of(option))
        score_axis(axis, lines[0].settings[0].measures[0], *ends(lines))
        grid(axis)
        figure.legend(loc="outside lower center", ncols=1, frameon=False, handlelength=2.4)
        return save(figure, folder, stem_of(option))


def draw_rows(option: str, lines: Sequence[Line], folder: Path) -> str:
    """Draws a row for each group, the option's values in it by colour and marker, one below the other.

    Args:
        option, lines, folder: see ``draw_ablation``.
    """
    values = categories(lines)
    heights = [max(2, len(line.values)) / 2 for line in lines]
    centres = [sum(heights[:row]) + height / 2 for row, height in enumerate(heights)]
    labels = [line.label for line in lines]
    width = COLUMN + LETTER * max(map(len, labels))
    columns = 3 if max(map(len, values)) < 20 else 2
    height = AROUND + ROW * sum(heights) + LEGEND * -(-len(values) // columns)
    with subplots(width, height) as (figure, axis):
        for number, value in enumerate(values):
            colour = PALETTE[number % len(PALETTE)]
            there = [(centre, line) for centre, line in zip(centres, lines, strict=True) if value in line.values]
            y = [centre + APART * (line.values.index(value) - (len(line.values) - 1) / 2) for centre, line in there]
            settings = [line.settings[line.values.index(value)] for _, line in there]
            means, errors = [s.score for s in settings], [s.score_std or 0.0 for s in settings]
            axis.errorbar(means, y, xerr=errors, linestyle="none", elinewidth=0.6, alpha=0.6, color=colour)
            marker = SHAPES[number % len(SHAPES)]
            axis.plot(means, y, marker, color=colour, markersize=3.4, markeredgewidth=0.0, label=value)
        axis.set_yticks(centres, labels)
        axis.set_ylim(sum(heights), 0)
        score_axis(axis, lines[0].settings[0].measures[0], *ends(lines), horizontal=True)
        grid(axis)
        title = None if len(values) > 2 else name_of(option)
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, title=title, title_fontsize=6)
        return save(figure, folder, stem_of(option))


def ends(lines: Sequence[Line]) -> tuple[float, float]:
    """Returns the lowest and the highest mean accuracy."""
    means = [s.score for line in lines for s in line.settings]
    return min(means), max(means)
