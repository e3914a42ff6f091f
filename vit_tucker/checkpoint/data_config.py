"""Reads how weights expect their images to be prepared, and the names of their classes, from the files beside them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_tucker.checkpoint.files import config_beside, read_json
from vit_tucker.errors import CheckpointError

DATA_CONFIG = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
"""Entries of timm's pretrained_cfg that say how images are prepared, which timm calls the data config."""
RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of interpolations, as Hugging Face's processors have them."""


def data_config_beside(file: Path) -> dict[str, Any]:
    """Returns how images are prepared, in entries of timm's pretrained_cfg; empty if no file beside the weights has it.

    Read are config.json of timm's layout, preprocessor_config.json of Hugging Face and open_clip_config.json.

    Args:
        file: the weights.

    Raises:
        CheckpointError: a value that can't be.
    """
    cfg, source = config_beside(file).get("pretrained_cfg"), "config.json"
    if isinstance(cfg, Mapping):
        found = {name: cfg[name] for name in DATA_CONFIG if cfg.get(name) is not None}
    elif processor := read_json(file.parent / "preprocessor_config.json"):
        found, source = of_processor(processor), "preprocessor_config.json"
    else:
        source = "open_clip_config.json"
        clip = read_json(file.parent / source).get("preprocess_cfg")
        entries = clip.items() if isinstance(clip, Mapping) else ()
        found = {name: value for name, value in entries if name in ("mean", "std", "interpolation")}
    for name, value in found.items():
        if not plausible(name, value):
            raise CheckpointError(f"{file.parent / source}: {name}: {value!r} is no way to prepare images")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def plausible(name: str, value: Any) -> bool:
    """Returns whether a value is of the kind that an entry of ``DATA_CONFIG`` has: numbers per channel, a share, or a word."""
    if name in ("mean", "std"):
        numbers = value if isinstance(value, list | tuple) else []
        finite = all(isinstance(x, int | float) and math.isfinite(x) for x in numbers)
        return bool(numbers) and finite and (name == "mean" or min(numbers) > 0)
    if name == "crop_pct":
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 2  # timm has 1.15
    return isinstance(value, str)


def size_beside(file: Path) -> tuple[int, int] | None:
    """Returns height and width of the images that weights were trained on, from config.json of timm's layout; None without."""
    cfg = config_beside(file).get("pretrained_cfg")
    size = cfg.get("input_size") if isinstance(cfg, Mapping) else None
    known = isinstance(size, list) and len(size) == 3 and all(isinstance(number, int) and number > 0 for number in size)
    return (size[1], size[2]) if known else None  # type: ignore[index]


def of_processor(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the same from the settings of a Hugging Face image processor: squash to a size, or resize and crop."""
    found: dict[str, Any] = {}
    if values.get("do_normalize", True):
        found |= {name: values[f"image_{name}"] for name in ("mean", "std") if values.get(f"image_{name}") is not None}
    if values.get("resample") in RESAMPLING:
        found["interpolation"] = RESAMPLING[values["resample"]]
    size, crop = values.get("size"), values.get("crop_size")
    if values.get("do_center_crop") and isinstance(size, Mapping) and isinstance(crop, Mapping):
        edge, height = size.get("shortest_edge") or size.get("height"), crop.get("height")
        if edge and height:
            found |= {"crop_pct": min(1.0, height / edge), "crop_mode": "center"}
    elif isinstance(size, Mapping) and "height" in size:
        found |= {"crop_pct": 1.0, "crop_mode": "squash"}
    return found


def label_names_beside(file: Path) -> tuple[str, ...] | None:
    """Returns the names of the classes in their order, from config.json of timm's or Hugging Face's layout; None without."""
    config = config_beside(file)
    names = config.get("label_names")
    if isinstance(names, list):
        return tuple(map(str, names))
    numbered = config.get("id2label")
    if isinstance(numbered, Mapping) and sorted(numbered) == sorted(map(str, range(len(numbered)))):
        found = tuple(str(numbered[str(index)]) for index in range(len(numbered)))
        return None if all(name.startswith("LABEL_") for name in found) else found  # made up where none were given
    return None
