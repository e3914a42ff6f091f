"""Finds the image sizes that a model accepts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vit_tucker.errors import ExportError
from vit_tucker.hosts.images import input_shape
from vit_tucker.hosts.structure import structure_copy


def size_step(model: nn.Module) -> tuple[int, int]:
    """Returns what height and width are multiples of: the patch size, or the reduction of the last stage."""
    size: Any = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)
    info: Any = getattr(model, "feature_info", None)
    entries = info if isinstance(info, list) else []
    reductions = [entry.get("reduction") for entry in entries if isinstance(entry, dict)]
    step = max((r for r in reductions if r), default=32)
    return step, step


def other_size(model: nn.Module, steps: tuple[int, int]) -> tuple[int, int]:
    """Returns a size that is not the model's own, nor square.

    What is recorded with it holds for all, also where timm asks first whether there is anything to resample.

    Args:
        model: of timm.
        steps: see ``size_step``.

    Raises:
        ExportError: the model takes its own size only, or pads windows.
    """
    channels, height, width = input_shape(model)
    other = height + steps[0], width + 2 * steps[1]
    try:
        with torch.no_grad():
            structure_copy(model).eval()(torch.empty(1, channels, *other, device="meta"))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        fixed = getattr(model, "dynamic_img_size", None) is False
        hint = "; make the model with dynamic_img_size=True" if fixed else ""
        raise ExportError(
            f"this {type(model).__name__} accepts images of {height}x{width} only ({reason}){hint}"
        ) from None
    windows = [name for name, module in model.named_modules() if getattr(module, "window_size", None)]
    if windows:  # torch tries for minutes
        raise ExportError(
            f"this {type(model).__name__} attends in windows ({windows[0]}): torch can't record their padding for all sizes"
        )
    return other


def sizes_to_compare(model: nn.Module, dynamic_img_size: bool) -> list[tuple[int, int, int]]:
    """Returns numbers of images, heights and widths to compare an export with: not the recorded ones alone."""
    _, height, width = input_shape(model)
    if not dynamic_img_size:
        return [(1, height, width), (3, height, width), (5, height, width)]
    down, across = size_step(model)
    return [(1, height, width), (3, height + 2 * down, width + across), (2, height + down, width + 3 * across)]
