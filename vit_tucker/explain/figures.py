"""Pictures of attention: rollout over the image, and a grid of heads by layers; dense and patched models side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from vit_tucker.report.style import COLUMN, FONTS, plt

COLOURS = "viridis"
"""Even lightness steps, and readable by colour-blind readers."""
SHARE_SHOWN = 0.995
"""Scales end at this quantile: single tokens that take all attention would leave the rest dark."""
DPI = 200
LARGEST = 12_000
"""Pixels of a picture's longer side at most; many layers and heads get smaller cells."""


@dataclass(frozen=True)
class Panel:
    """One model's part of a picture.

    Attributes:
        title: the model, and what it says of the image.
        rollout: (h, w) relative to uniform, or None.
        note: shown in place of a rollout that is not defined.
        heads: by layer, (H, h, w).
        labels: below or beside layers, by name, e.g. their agreement with the other model.
    """

    title: str
    rollout: Tensor | None
    note: str
    heads: Mapping[str, Tensor]


def draw_rollout(image: np.ndarray, panels: Sequence[Panel], title: str) -> Figure:
    """The image, and each model's rollout over it, all on one scale.

    Args:
        image: (height, width, 3), uint8, as the model sees it.
        panels: of the models.
        title: of the image.
    """
    shown = [panel.rollout for panel in panels if panel.rollout is not None]
    with plt.rc_context(FONTS):
        width = COLUMN / 2 * (1 + len(panels)) + 0.55
        figure = new_figure(width, COLUMN / 2 * image.shape[0] / image.shape[1] + 0.5)
        axes = figure.subplots(1, 1 + len(panels), squeeze=False)[0]
        show_image(axes[0], image)
        axes[0].set_title(title, parse_math=False)
        scale = Normalize(0, max((top(rollout) for rollout in shown), default=1.0))
        for axis, panel in zip(axes[1:], panels, strict=True):
            axis.set_title(panel.title, parse_math=False)
            if panel.rollout is None:
                write_note(axis, panel.note)
            else:
                drawn = show_over(axis, image, panel.rollout, scale)
        if shown:
            bar = figure.colorbar(drawn, ax=axes, shrink=0.8, pad=0.01, aspect=25, extend="max")
            bar.set_label("rollout (1: even share)")
        return figure


def draw_heads(panels: Sequence[Panel], title: str, agreement: Mapping[str, float] | None = None) -> Figure:
    """A grid of heads by layers for each model, side by side; a head has the same scale in both.

    Args:
        panels: of the models.
        title: of the picture.
        agreement: by layer, mean total variation distance of the models' maps; written beside the rows.
    """
    layers = list(dict.fromkeys(name for panel in panels for name in panel.heads))
    columns = max((len(panel.heads[name]) for panel in panels for name in panel.heads), default=1)
    ratio = next((h.shape[1] / h.shape[2] for panel in panels for h in panel.heads.values()), 1.0)
    cell = min(0.85, max(0.42, 6.8 / (columns * len(panels))))
    with plt.rc_context(FONTS):
        label = 1.5 if len(panels) > 1 else 1.2
        figure = new_figure(label + cell * 1.04 * columns * len(panels), 0.65 + cell * 1.04 * ratio * len(layers))
        figure.suptitle(title, fontsize=7, parse_math=False)
        blocks = figure.subfigures(1, len(panels), squeeze=False, wspace=0.02)[0]
        for number, (block, panel) in enumerate(zip(blocks, panels, strict=True)):
            block.suptitle(panel.title, fontsize=7, parse_math=False)
            axes = block.subplots(len(layers), columns, squeeze=False)
            for row, name in zip(axes, layers, strict=True):
                draw_row(row, name, panels, number)
                if number == 0:
                    write_label(row[0], row_label(name, agreement))
        return figure


def draw_row(row: Sequence[Any], name: str, panels: Sequence[Panel], number: int) -> None:
    """The heads of one layer of one model, each on the scale of both models' heads."""
    heads = panels[number].heads.get(name)
    for head, axis in enumerate(row):
        axis.set(xticks=[], yticks=[])
        if heads is None or head >= len(heads):
            axis.set_axis_off()
            continue
        pairs = [p.heads[name][head] for p in panels if name in p.heads and head < len(p.heads[name])]
        scale = Normalize(0, max(top(pair) for pair in pairs))
        axis.imshow(heads[head], cmap=COLOURS, norm=scale, interpolation="nearest")
        for spine in axis.spines.values():
            spine.set_visible(False)


def row_label(name: str, agreement: Mapping[str, float] | None) -> str:
    """'blocks.3.attn' as 'blocks.3', with its agreement."""
    short = name.removesuffix(".attn")
    return short if agreement is None or name not in agreement else f"{short}\nTV {agreement[name]:.2f}"


def write_label(axis: Any, text: str) -> None:
    """To the left of a row."""
    axis.set_ylabel(text, rotation=0, ha="right", va="center", labelpad=3, fontsize=6, visible=True)


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, not of pyplot's: nothing to close."""
    dpi = min(DPI, LARGEST / max(width, height))
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0.0, hspace=0.0)  # type: ignore[union-attr]
    FigureCanvasAgg(figure)
    return figure


def show_image(axis: Any, image: np.ndarray) -> None:
    """The image alone."""
    axis.imshow(image, interpolation="nearest" if image.shape[0] < 64 else "antialiased")
    axis.set(xticks=[], yticks=[])


def show_over(axis: Any, image: np.ndarray, values: Tensor, scale: Normalize) -> Any:
    """Values in colour over the grey image; returns what a colour bar needs."""
    grey = image.mean(-1)
    height, width = grey.shape
    axis.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    drawn = axis.imshow(
        values, cmap=COLOURS, norm=scale, alpha=0.65, interpolation="nearest", extent=(-0.5, width - 0.5, height - 0.5, -0.5)
    )
    axis.set(xticks=[], yticks=[])
    return drawn


def write_note(axis: Any, text: str) -> None:
    """A sentence in place of a picture."""
    axis.set(xticks=[], yticks=[])
    axis.text(0.5, 0.5, text, ha="center", va="center", wrap=True, fontsize=6, transform=axis.transAxes, parse_math=False)


def top(values: Tensor) -> float:
    """End of a scale, above 0."""
    return max(float(np.quantile(np.asarray(values), SHARE_SHOWN)), 1e-12)


def pixels(figure: Figure) -> np.ndarray:
    """A drawn figure as RGB, (height, width, 3), uint8."""
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_png(figure: Figure, file: Path) -> None:
    """The same bytes for the same data."""
    figure.savefig(file, dpi=figure.dpi, metadata={"Software": None})
