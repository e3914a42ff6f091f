"""Collects what a consumer of an exported file must know to use it, as strings by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from vit_tucker.attention.module import AttentionModule
from vit_tucker.checkpoint.describe import image_options
from vit_tucker.hosts.find import find_attention
from vit_tucker.hosts.images import input_shape
from vit_tucker.patching.record import host_name, patch_record

FROM_CFG = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names", "license")
"""Entries of timm's pretrained_cfg that are handed on, under timm's names, where the model has them."""


def file_metadata(model: nn.Module, normalised_inside: bool, version: str) -> dict[str, str]:
    """Returns the metadata of a model's export; values that are no strings as JSON.

    Args:
        model: as it was loaded, patched or plain.
        normalised_inside: the file takes images in [0, 1] and normalises them itself.
        version: of vit_tucker.
    """
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    values: dict[str, Any] = {
        "producer": f"vit_tucker {version}",
        "architecture": host_name(model) or type(model).__name__,
    }
    values |= {"input_size": input_shape(model), "num_classes": getattr(model, "num_classes", None)}
    values |= {name: cfg.get(name) for name in FROM_CFG}
    values["image"] = "NCHW, float32, RGB" if input_shape(model)[0] == 3 else "NCHW, float32"
    values["image_range"] = "[0, 1]; normalised inside" if normalised_inside else "(pixel / 255 - mean) / std"
    values |= image_options(model)
    values["attention"] = attention(model)
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
        if value is not None
    }


def attention(model: nn.Module) -> dict[str, Any]:
    """Returns method and options of a patched model, and which layers have them; the method alone where there is no record."""
    layers = {name: type(m).__name__ for name, m in find_attention(model).items() if isinstance(m, AttentionModule)}
    if not layers:
        return {"method": "dense"}
    record = patch_record(model)
    if record is None:
        return {"modules": layers}
    options = record.config.model_dump(mode="json", exclude_defaults=True)
    return {"method": record.config.method, **options, "modules": layers}
