"""Image files: which there are, how they are decoded, and how any Pillow image becomes 8-bit grey or RGB."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vit_tucker.data.find_images import walk
from vit_tucker.errors import DataError, one_line

NO_PICTURES = frozenset({"PDF", "EPS", "MPEG", "HDF5", "FITS", "GRIB", "BUFR", "WMF", "IPTC"})
"""Formats that Pillow lists and only identifies, or that are documents."""
SIXTEEN_BIT = ("PNG", "PPM")
"""Formats whose grey images of mode I have 16 bits: older Pillow opens PNG so, every one PGM, scaled to 65535."""


@dataclass(frozen=True)
class ImageOptions:
    """Options for reading stored images, the same in training and wherever the model is used.

    Attributes:
        exif_orientation: turn images as their EXIF data says.
        value_range: (low, high) of stored values that become black and white, for images of more than 8 bits; None: the range
            of the image's mode.
    """

    exif_orientation: bool = False
    value_range: tuple[float, float] | None = None

    @staticmethod
    def of(source: Any) -> "ImageOptions":
        """Returns the options that a data section, or a mapping as ``plain`` returns it, has."""
        values = source if isinstance(source, Mapping) else vars(source)
        low_high = values.get("value_range")
        return ImageOptions(
            bool(values.get("exif_orientation", False)),
            None if low_high is None else (float(low_high[0]), float(low_high[1])),
        )

    def plain(self) -> dict[str, Any]:
        """Returns the options that differ from the defaults, as JSON has them."""
        return {name: value for name, value in asdict(self).items() if value != getattr(AS_STORED, name)}


AS_STORED = ImageOptions()


def image_mode(channels: int) -> str:
    """Returns Pillow's mode of the images of a model with so many channels: "L" for 1, else "RGB"."""
    return "L" if channels == 1 else "RGB"


def to_mode(image: Image.Image, mode: str, options: ImageOptions = AS_STORED) -> Image.Image:
    """Returns an opened image in 8 bits, its pixels decoded.

    Args:
        image: of any mode. 8-bit ones are converted by Pillow; of more bits, values are scaled linearly to 0..255 and rounded.
        mode: "L" or "RGB".
        options: see ``ImageOptions``.

    Raises:
        DataError: the range of its values is not known. Whatever Pillow raises for damaged files.
    """
    if options.exif_orientation:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = scaled(image, options.value_range)
    return image.convert(mode)


def scaled(image: Image.Image, value_range: tuple[float, float] | None) -> Image.Image:
    """Returns a grey image of more than 8 bits as one of 8, see ``to_mode``.

    Raises:
        DataError: the range of its values is not known.
    """
    if value_range is None:
        if not image.mode.startswith("I;16") and not (image.mode == "I" and image.format in SIXTEEN_BIT):
            kind = "floating-point" if image.mode == "F" else "32-bit integer"
            raise DataError(
                f"a {kind} image (Pillow's mode {image.mode}), whose values for black and white are unknown; set "
                "data.value_range: [low, high]"
            )
        value_range = (0.0, 65535.0)
    low, high = value_range
    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=low, posinf=high, neginf=low)
    return Image.fromarray(np.rint((values.clip(low, high) - low) * 255 / (high - low)).astype(np.uint8))


@lru_cache
def image_endings() -> frozenset[str]:
    """Returns the endings of image files, lower case with their dots: of all formats that Pillow decodes."""
    Image.init()
    formats = Image.registered_extensions().items()
    return frozenset(ending for ending, kind in formats if kind in Image.OPEN and kind not in NO_PICTURES)


def list_images(paths: Sequence[Path]) -> list[Path]:
    """Returns files, whatever their names, and all images in folders and the folders inside them, by name.

    Raises:
        DataError: a path that is missing, or a folder without images.
    """
    files = []
    for path in paths:
        if path.is_file():
            files.append(path)
            continue
        if not path.is_dir():
            raise DataError(f"{path}: no such file or folder")
        found = sorted(path / name for name in walk(path, image_endings()).images)
        if not found:
            raise DataError(f"{path}: the folder has no images")
        files += found
    return files


def read_image_file(file: Path, mode: str, options: ImageOptions = AS_STORED) -> Image.Image:
    """Decodes an image file as 8-bit grey or RGB.

    Args:
        file: of any format that Pillow reads.
        mode: of PIL, "L" or "RGB".
        options: see ``ImageOptions``.

    Raises:
        DataError: it can't be read; one line with the reason.
    """
    try:
        with Image.open(file) as opened:
            return to_mode(opened, mode, options)
    except Exception as error:  # decoders raise anything
        reason = one_line(error).replace(f" {str(file)!r}", "")
        raise DataError(f"{file}: can't be read as an image: {reason or type(error).__name__}") from None
