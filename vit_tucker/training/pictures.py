"""Evaluation images with the model's predictions, as one picture for TensorBoard."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MAX_IMAGES = 16
CELL, GAP, TITLE, DPI = 1.6, 0.1, 0.42, 100
"""Inches of an image's longer side, between two, and of the two lines above one; dots per inch."""

RIGHT, WRONG = "#1a7f37", "#c62828"


def prediction_figure(
    images: Tensor,
    labels: Tensor,
    logits: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Draws up to 16 images, each with the numbers of its true and its predicted class and its probability; wrong ones in red.

    Args:
        images: normalised, (B, channels, height, width), on any device; grey or RGB, of others the first channel is shown.
        labels: true classes, (B,).
        logits: (B, classes).
        mean, std: of the normalisation, for each channel.

    Returns:
        RGB picture, (3, H, W), uint8.

    Raises:
        ValueError: no images.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: it takes half a second to import
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    count = min(len(images), MAX_IMAGES)
    if count == 0:
        raise ValueError("no images to show")
    pictures = denormalise(images[:count], mean, std)
    probability, predicted = logits[:count].detach().float().softmax(-1).cpu().max(-1)
    true = labels[:count].cpu()
    columns = min(count, 4)
    rows = -(-count // columns)
    width, height = columns * (CELL + GAP), rows * (CELL + TITLE)
    figure = Figure(figsize=(width, height), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    axis = figure.add_axes((0, 0, 1, 1))  # one for all images: sixteen take three times as long
    axis.set_axis_off()
    for i in range(count):
        right = bool(predicted[i] == true[i])
        colour, weight = (RIGHT, "normal") if right else (WRONG, "bold")
        h, w = (CELL * side / max(pictures.shape[1:3]) for side in pictures.shape[1:3])
        x = (i % columns + 0.5) * (CELL + GAP) - w / 2
        y = height - (i // columns + 1) * (CELL + TITLE) + GAP / 2 + (CELL - h) / 2
        axis.imshow(pictures[i], extent=(x, x + w, y, y + h), interpolation="nearest")  # small images keep their pixels
        axis.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=colour, linewidth=1 if right else 3))
        title = f"{int(predicted[i])}  {probability[i]:.0%}\ntrue: {int(true[i])}"
        axis.text(x + w / 2, y + h + 0.04, title, ha="center", va="bottom", fontsize=8, color=colour, weight=weight)
    axis.set(xlim=(0, width), ylim=(0, height), aspect="auto")
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy()).permute(2, 0, 1)


def denormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undoes the normalisation of images, rounded and clamped to what can be shown.

    Args:
        images: (B, channels, height, width).
        mean, std: for each channel, or one for all.

    Returns:
        (B, height, width, 3), uint8; grey images in three equal channels.
    """
    values = images.detach().float().cpu()
    shift, scale = (torch.tensor(list(x)).view(1, -1, 1, 1) for x in (mean, std))
    values = ((values * scale + shift) * 255).round().clamp(0, 255).to(torch.uint8)
    if values.shape[1] != 3:
        values = values[:, :1].expand(-1, 3, -1, -1)
    return values.permute(0, 2, 3, 1).numpy()
