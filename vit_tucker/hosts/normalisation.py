"""Normalisation of images with another number of channels than it was made for."""

from collections.abc import Sequence


def fit_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Returns means or deviations for a model's channels; where it has others than the images, their mean for each, as in timm.

    Args:
        values: one per channel of some images.
        channels: of the model's images.
    """
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
