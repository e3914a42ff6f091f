"""Random parameters of timm's training transform for a whole batch; those of an image follow from its key and the seed alone."""

import math
from dataclasses import dataclass

import numpy as np

from vit_tucker.config.schema import DataConfig
from vit_tucker.data.philox import philox, uniforms
from vit_tucker.data.sampler import Key

ATTEMPTS = 10  # timm tries so often to fit a crop, and a box to erase
_FLAGS, _ERASE, _BOXES = (
    ATTEMPTS,
    ATTEMPTS + 1,
    ATTEMPTS + 2,
)  # blocks of four numbers behind those of the crop's attempts
_ERASED_AREA = (0.02, 1 / 3)  # timm.data.random_erasing's defaults, as all the constants here
_ERASED_ASPECT = (0.3, 1 / 0.3)
_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Parameters:
    """Parameters of a batch.

    Attributes:
        boxes: (B, 4) integers: top, left, height, width of the crop, in pixels of the stored image.
        bicubic: (B,) bool, else bilinear.
        hflip, vflip: (B,) bool.
        erased: per image, boxes (top, left, height, width) in pixels of the result.
        noise: (B,) seeds of what the boxes are filled with.
    """

    boxes: np.ndarray
    bicubic: np.ndarray
    hflip: np.ndarray
    vflip: np.ndarray
    erased: list[list[tuple[int, int, int, int]]]
    noise: np.ndarray


def draw_parameters(
    keys: list[Key], philox_key: tuple[int, int], data: DataConfig, stored: tuple[int, int], size: tuple[int, int]
) -> Parameters:
    """Draw as timm does: the same distributions, from numbers that depend on (seed, epoch, image, repeat).

    Args:
        keys: (epoch, index, repeat) of each image.
        philox_key: from the run's seed.
        data: ranges and probabilities.
        stored: (height, width) of the stored images.
        size: (height, width) of the result.
    """
    table = np.asarray(keys, dtype=np.uint64).reshape(len(keys), 3)
    blocks = _BOXES + data.recount * ATTEMPTS if data.reprob else _FLAGS + 1
    counters = np.empty((len(keys), blocks, 4), dtype=np.uint64)
    counters[:, :, :3] = table[:, None]
    counters[:, :, 3] = np.arange(blocks, dtype=np.uint64)
    words = philox(counters, philox_key)
    numbers = uniforms(words)
    flags = numbers[:, _FLAGS]
    interpolation = data.interpolation or "random"
    bicubic = flags[:, 0] >= 0.5 if interpolation == "random" else np.full(len(keys), interpolation == "bicubic")
    erased: list[list[tuple[int, int, int, int]]] = [[] for _ in keys]
    noise = np.zeros(len(keys), dtype=np.uint64)
    if data.reprob:
        noise = words[:, _ERASE, 1] << np.uint64(31) | words[:, _ERASE, 2]  # 63 bits
        for row in np.flatnonzero(flags[:, 3] <= data.reprob):
            erased[row] = erased_boxes(numbers[row, _ERASE, 0], numbers[row, _BOXES:], data.recount, size)
    return Parameters(
        boxes=crop_boxes(numbers[:, :ATTEMPTS], data.scale or _SCALE, data.ratio or _RATIO, stored),
        bicubic=bicubic,
        hflip=flags[:, 1] < data.hflip,
        vflip=flags[:, 2] < data.vflip,
        erased=erased,
        noise=noise,
    )


def crop_boxes(
    numbers: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float], stored: tuple[int, int]
) -> np.ndarray:
    """Boxes of a random resized crop; see timm's RandomResizedCropAndInterpolation.get_params.

    Args:
        numbers: (B, attempts, 4) in (0, 1).
        scale: range of the share of the image's area.
        ratio: range of width / height.
        stored: (height, width).

    Returns:
        (B, 4) int64: top, left, height, width.
    """
    image_h, image_w = stored
    target = (scale[0] + numbers[..., 0] * (scale[1] - scale[0])) * (image_h * image_w)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + numbers[..., 1] * (high - low))
    width, height = np.rint(np.sqrt(target * aspect)), np.rint(np.sqrt(target / aspect))
    fits = (width <= image_w) & (height <= image_h)
    rows, first = np.arange(len(numbers)), fits.argmax(1)
    height, width = np.maximum(height[rows, first], 1), np.maximum(width[rows, first], 1)
    top = np.floor(numbers[rows, first, 2] * (image_h - height + 1))
    left = np.floor(numbers[rows, first, 3] * (image_w - width + 1))
    boxes = np.stack([top, left, height, width], axis=1).astype(np.int64)
    boxes[~fits.any(1)] = central_box(ratio, stored)
    return boxes


def central_box(ratio: tuple[float, float], stored: tuple[int, int]) -> tuple[int, int, int, int]:
    """timm's crop where no attempt fits: the largest central one of an allowed aspect ratio."""
    image_h, image_w = stored
    height, width = image_h, image_w
    if image_w / image_h < min(ratio):
        height = round(width / min(ratio))
    elif image_w / image_h > max(ratio):
        width = round(height * max(ratio))
    return (image_h - height) // 2, (image_w - width) // 2, height, width


def erased_boxes(
    count_number: float, numbers: np.ndarray, recount: int, size: tuple[int, int]
) -> list[tuple[int, int, int, int]]:
    """Boxes that random erasing takes out of one image; see timm's RandomErasing.

    Args:
        count_number: in (0, 1), chooses how many.
        numbers: (recount * attempts, 4) in (0, 1).
        recount: largest number of boxes.
        size: (height, width) of the result.

    Returns:
        (top, left, height, width) of each.
    """
    height, width = size
    count = 1 + int(count_number * recount)
    boxes = []
    log_aspect = math.log(_ERASED_ASPECT[0]), math.log(_ERASED_ASPECT[1])
    for number in range(count):
        for area, aspect, y, x in numbers[number * ATTEMPTS : (number + 1) * ATTEMPTS].tolist():
            target = (_ERASED_AREA[0] + area * (_ERASED_AREA[1] - _ERASED_AREA[0])) * height * width / count
            stretch = math.exp(log_aspect[0] + aspect * (log_aspect[1] - log_aspect[0]))
            h, w = round(math.sqrt(target * stretch)), round(math.sqrt(target / stretch))
            if w < width and h < height:
                boxes.append((int(y * (height - h + 1)), int(x * (width - w + 1)), h, w))
                break
    return boxes
