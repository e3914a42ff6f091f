"""Pictures of attention: rollout over the image, and a grid of heads by layers; dense and patched models side by side."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

from vit_tucker.show.figures import COLUMN, FONTS
from vit_tucker.show.fonts import installed_fonts

COLOURS = "viridis"
"""Even lightness steps, and readable by colour-blind readers."""
SHARE_SHOWN = 0.98
"""Scales end at this quantile: single tokens that take most attention would leave the rest dark."""
DPI = 200
GAP, HEADING, INSIDE = 0.12, 0.52, 0.94
"""Inches between two models' heads and above all heads; share of a cell that its picture takes."""
INPUT, BAR, UNDER = 0.9, 0.07, 0.55
"""Inches: the longer side of the input beside the heads, the height of the colour bar below it, and what both captions take."""
NUMBERS: dict[str, Any] = {
    "fontsize": 4.5,
    "color": "white",
    "path_effects": [withStroke(linewidth=0.9, foreground="black")],
}
LARGEST = 12_000
"""Pixels of a picture's longer side at most; many layers and heads get smaller cells."""


class Panel(NamedTuple):
    """One model's part of a picture.

    Attributes:
        title: the model, and what it says of the image.
        rollout: (h, w) relative to uniform, or None.
        note: shown in place of a rollout that is not defined.
        heads: by layer, (H, h, w) relative to uniform.
    """

    title: str
    rollout: Tensor | None
    note: str
    heads: Mapping[str, Tensor]


def draw_rollout(image: np.ndarray, panels: Sequence[Panel], title: str, kind: str = "rollout") -> Figure:
    """Draws an image and each model's rollout (or relevance) over it, all on one scale.

    Args:
        image: (height, width, 3) uint8.
        panels: one for each model.
        title: of the image.
        kind: "rollout" or "relevance".
    """
    shown = [panel.rollout for panel in panels if panel.rollout is not None]
    with rc_context(FONTS):
        width = COLUMN / 2 * (1 + len(panels)) + 0.55
        figure = new_figure(width, COLUMN / 2 * image.shape[0] / image.shape[1] + 0.4, "constrained")
        axes = figure.subplots(1, 1 + len(panels), squeeze=False)[0]
        axes[0].imshow(image, interpolation="nearest" if image.shape[0] < 64 else "antialiased")
        axes[0].set(xticks=[], yticks=[])
        axes[0].set_title(title, parse_math=False)
        scale = Normalize(0, max((top(rollout) for rollout in shown), default=1.0))
        for axis, panel in zip(axes[1:], panels, strict=True):
            axis.set_title(panel.title, parse_math=False)
            if panel.rollout is None:
                write_note(axis, panel.note, image.shape)
            else:
                drawn = show_over(axis, image, panel.rollout, scale)
        if shown:
            bar = figure.colorbar(drawn, ax=axes, shrink=0.8, pad=0.01, aspect=25, extend="max")
            bar.set_label(f"{kind} (1: even share)")
        return figure


def draw_heads(
    image: np.ndarray, panels: Sequence[Panel], title: str, agreement: Mapping[str, float] | None = None
) -> Figure:
    """Draws a grid of heads by layers for each model, side by side; a head has the same scale in both.

    Args:
        image: what the models see, (height, width, 3) uint8.
        panels: of the models.
        title: of the picture.
        agreement: by layer, mean total variation distance of the models' maps; written beside the rows.
    """
    layers = list(dict.fromkeys(name for panel in panels for name in panel.heads))
    columns = max(len(panel.heads[name]) for panel in panels for name in panel.heads)
    ratio = next(h.shape[1] / h.shape[2] for panel in panels for h in panel.heads.values())
    cell = min(0.85, max(0.42, 6.8 / (columns * len(panels))))
    names = [row_label(name, agreement) for name in layers]
    input_width, input_height = (INPUT * side / max(image.shape[:2]) for side in (image.shape[1], image.shape[0]))
    left = 0.2 + INPUT + 0.05 * max(len(line) for name in names for line in name.split("\n"))
    block, line = columns * cell + GAP, cell * ratio
    width, height = left + len(panels) * block, HEADING + max(len(layers) * line, input_height + BAR + UNDER) + 0.05
    with rc_context(FONTS):
        figure = new_figure(width, height)
        axis = figure.add_axes((0, 0, 1, 1))  # one for all: hundreds of axes take seconds
        axis.text(0.05, height - 0.12, title, ha="left", va="center", fontsize=7, parse_math=False)
        draw_input(axis, image, (0.05, 0.05 + input_width, height - HEADING - input_height, height - HEADING))
        axis.text(left - 0.06, height - 0.45, "head", ha="right", va="center", fontsize=6)
        for number, panel in enumerate(panels):
            corner = left + number * block
            axis.text(corner, height - 0.3, panel.title, ha="left", va="center", fontsize=7, parse_math=False)
            for head in range(max(map(len, panel.heads.values()), default=0)):
                axis.text(corner + (head + 0.5) * cell, height - 0.45, str(head), ha="center", va="center", fontsize=6)
        for i, name in enumerate(layers):
            bottom = height - HEADING - (i + 1) * line
            axis.text(left - 0.06, bottom + line / 2, names[i], ha="right", va="center", fontsize=6)
            for number in range(len(panels)):
                for head, (values, scale) in enumerate(row_of(name, panels, number)):
                    corner = left + number * block + head * cell
                    place = (corner, corner + cell * INSIDE, bottom, bottom + line * INSIDE)
                    axis.imshow(values.numpy(), cmap=COLOURS, norm=scale, interpolation="nearest", extent=place)
                    end = f"{scale.vmax or 0:.1f}"
                    axis.text(place[1] - 0.02, bottom + 0.02, end, ha="right", va="bottom", **NUMBERS)
        axis.set(xlim=(0, width), ylim=(0, height), aspect="auto")
        axis.set_axis_off()
        return figure


def draw_input(axis: Any, image: np.ndarray, place: tuple[float, float, float, float]) -> None:
    """Draws the input, and below it the colour bar of all maps with its meaning.

    Args:
        axis: whose unit is an inch.
        image: (height, width, 3) uint8.
        place: left, right, bottom and top of the input.
    """
    left, _, bottom, _ = place
    axis.imshow(image, interpolation="nearest" if image.shape[0] < 64 else "antialiased", extent=place)
    top_of_bar = bottom - 0.12
    bar = (left, left + INPUT, top_of_bar - BAR, top_of_bar)
    axis.imshow(np.linspace(0, 1, 256)[None], cmap=COLOURS, interpolation="nearest", extent=bar)
    axis.text(left, bar[2] - 0.03, "0", ha="left", va="top", fontsize=5)
    axis.text(bar[1], bar[2] - 0.03, "number in the map", ha="right", va="top", fontsize=5)
    axis.text(left, bar[2] - 0.15, "attention to a patch\n(1: even share)", ha="left", va="top", fontsize=5)


def row_of(name: str, panels: Sequence[Panel], number: int) -> list[tuple[Tensor, Normalize]]:
    """Returns the heads of one layer of one model, each with the scale of all models' heads of that number.

    Args:
        name: of the layer.
        panels: one for each model.
        number: of the model's panel.
    """
    heads = panels[number].heads.get(name)
    if heads is None:
        return []
    rivals = [panel.heads[name] for panel in panels if name in panel.heads]
    return [(own, Normalize(0, max(top(r[i]) for r in rivals if i < len(r)))) for i, own in enumerate(heads)]


def row_label(name: str, agreement: Mapping[str, float] | None) -> str:
    """Returns 'blocks.3' for blocks.3.attn, with its agreement."""
    short = name.removesuffix(".attn")
    return short if agreement is None or name not in agreement else f"{short}\nTV {agreement[name]:.2f}"


def new_figure(width: float, height: float, layout: str | None = None) -> Figure:
    """Returns a figure of its own, not of pyplot's: nothing to close.

    Args:
        width, height: inches.
        layout: matplotlib's, such as "constrained"; None for none.
    """
    figure = Figure(figsize=(width, height), dpi=min(DPI, LARGEST / max(width, height)), layout=layout)  # type: ignore[arg-type]
    FigureCanvasAgg(figure)
    return figure


def show_over(axis: Any, image: np.ndarray, values: Tensor, scale: Normalize) -> Any:
    """Draws values in colour over the grey image; returns what a colour bar needs.

    Args:
        axis: of matplotlib.
        image: (height, width, 3) uint8.
        values: (rows, columns), stretched over the image.
        scale: of the colours.
    """
    grey = image.mean(-1)
    height, width = grey.shape
    axis.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    place = (-0.5, width - 0.5, height - 0.5, -0.5)
    drawn = axis.imshow(values.numpy(), cmap=COLOURS, norm=scale, alpha=0.65, interpolation="nearest", extent=place)
    axis.set(xticks=[], yticks=[])
    return drawn


def write_note(axis: Any, text: str, shape: Sequence[int]) -> None:
    """Writes a sentence in place of a picture of the same shape.

    Args:
        axis: of matplotlib.
        text: the sentence, wrapped here.
        shape: (height, width) of the picture.
    """
    axis.imshow(np.full((*shape[:2], 3), 255, np.uint8))
    axis.set(xticks=[], yticks=[])
    lines = textwrap.fill(text, 30, break_on_hyphens=False)
    note = axis.text(0.5, 0.5, lines, ha="center", va="center", fontsize=6, transform=axis.transAxes, parse_math=False)
    note.set_in_layout(False)


def top(values: Tensor) -> float:
    """Returns the end of a colour scale for ``values`` (any shape), above 0."""
    return max(float(np.quantile(values.numpy(), SHARE_SHOWN)), 1e-12)


def pixels(figure: Figure) -> np.ndarray:
    """Returns a drawn figure as RGB, (height, width, 3), uint8."""
    canvas: Any = figure.canvas
    with installed_fonts(figure):
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_png(figure: Figure, file: Path) -> None:
    """Writes a figure, the same bytes for the same data."""
    with installed_fonts(figure):
        figure.savefig(file, dpi=figure.dpi, metadata={"Software": None})
