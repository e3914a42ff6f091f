"""Crop and resize a batch of images, each by its own box, as Pillow does: two matrix products with antialiased weights.

Pillow's resize rounds to 8 bits after the horizontal and after the vertical pass, and so does this (new versions of Pillow begin
with the cheaper pass, which matters where a bicubic's overshoot is clipped). Pixels are integers and
weights multiples of 2^-15, so that all sums are exact in float32: the result of an image does not depend on the batch it comes
in, on the order of summation, or on the machine.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

CHUNK_VALUES = 2**20
WEIGHT_BITS = 15
"""255 * 2^15, times the at most 1.3 that a bicubic's absolute weights sum to, is below float32's 2^24."""


def bilinear(x: np.ndarray) -> np.ndarray:
    """Pillow's triangle filter, of support 1."""
    return np.maximum(1 - np.abs(x), 0)


def bicubic(x: np.ndarray) -> np.ndarray:
    """Pillow's bicubic filter (a = -0.5), of support 2."""
    x = np.abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0.0))


def resize_weights(start: np.ndarray, length: np.ndarray, out: int, full: int, flip: np.ndarray, cubic: bool) -> Tensor:
    """Matrices that crop and resize along one axis.

    Args:
        start, length: (B,) integers, of the crop.
        out: pixels of the result.
        full: pixels of the stored image.
        flip: (B,) bool, mirror the result.
        cubic: bicubic, else bilinear.

    Returns:
        (B, out, full) float32.

    Source: Pillow's precompute_coeffs (src/libImaging/Resample.c).
    """
    kernel, support = (bicubic, 2.0) if cubic else (bilinear, 1.0)
    scale = length[:, None] / out
    stretch = np.maximum(scale, 1.0)  # antialiasing: a kernel as wide as a pixel of the result
    position = np.arange(out)
    position = np.where(flip[:, None], out - 1 - position, position)
    center = (position + 0.5) * scale  # (B, out)
    first = np.maximum(np.trunc(center - support * stretch + 0.5), 0)
    last = np.minimum(np.trunc(center + support * stretch + 0.5), length[:, None])
    taps = int(np.ceil(support * stretch.max())) * 2 + 1
    pixel = first[..., None] + np.arange(taps)  # (B, out, taps), within the crop
    weights = kernel((pixel - center[..., None] + 0.5) / stretch[..., None]) * (pixel < last[..., None])
    sums = weights.cumsum(-1)
    sums = np.rint(sums * (2.0**WEIGHT_BITS / sums[..., -1:]))  # rounding the sums, not the weights, these add up to 1
    weights = np.diff(sums, axis=-1, prepend=0.0) * 2.0**-WEIGHT_BITS
    matrix = np.zeros((len(start), out, full + taps), dtype=np.float32)  # taps beyond the image have weight 0
    np.put_along_axis(matrix, pixel.astype(np.int64) + start[:, None, None], weights.astype(np.float32), axis=2)
    return torch.from_numpy(matrix)[:, :, :full]


def crop_resize(
    pixels: Tensor, boxes: np.ndarray, size: tuple[int, int], hflip: np.ndarray, vflip: np.ndarray, cubic: bool
) -> Iterator[tuple[int, int, Tensor]]:
    """Crop, resize and mirror each image; some at a time, so that they stay in the processor's cache.

    Args:
        pixels: (B, height, channels, width) uint8.
        boxes: (B, 4) integers: top, left, height, width.
        size: (height, width) of the result.
        hflip, vflip: (B,) bool.
        cubic: bicubic, else bilinear.

    Yields:
        First and last (exclusive) of these images, and (b, channels, *size) float32, integers from 0 to 255, not contiguous.
    """
    count, height, channels, width = pixels.shape
    across = resize_weights(boxes[:, 1], boxes[:, 3], size[1], width, hflip, cubic).transpose(1, 2)
    down = resize_weights(boxes[:, 0], boxes[:, 2], size[0], height, vflip, cubic)
    step = max(1, CHUNK_VALUES // (channels * size[0] * size[1]))
    for first in range(0, count, step):
        last = min(first + step, count)
        part = pixels[first:last].to(torch.float32).view(last - first, height * channels, width)
        rows = to_8_bits(torch.bmm(part, across[first:last]), cubic).view(last - first, height, channels * size[1])
        values = to_8_bits(torch.bmm(down[first:last], rows), cubic)
        yield first, last, values.view(last - first, size[0], channels, size[1]).transpose(1, 2)


def to_8_bits(values: Tensor, cubic: bool) -> Tensor:
    """Rounded half up and, as only a bicubic overshoots, clipped as Pillow does; in place."""
    values.add_(0.5).floor_()
    return values.clamp_(0, 255) if cubic else values
