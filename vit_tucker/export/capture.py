"""A model recorded by torch.export, for any number of images and, where the model allows it, images of any size."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.errors import ExportError
from vit_tucker.export.sizes import other_size, size_step, sizes_to_compare
from vit_tucker.hosts.find import inner, refuse_wrapped
from vit_tucker.hosts.images import input_shape
from vit_tucker.hosts.normalisation import fit_channels
from vit_tucker.patching.record import shared_records

TRACED_BATCH = 2
"""Images that the model is recorded with: torch takes a size of 1 for a constant."""


class Normalised(nn.Module):
    """A model for images in [0, 1], which it normalises itself: (image - mean) / std."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Normalises images in [0, 1], (B, channels, H, W), and returns what the model makes of them."""
        y: Tensor = self.model((image - self.mean) / self.std)
        return y


def served(model: nn.Module, normalise: bool) -> nn.Module:
    """Returns a copy as it is exported: on the CPU, float32, eval mode, without the layers that a patch replaced.

    Args:
        model: any; it is not touched.
        normalise: take images in [0, 1], by the mean and std of the model's pretrained_cfg.

    Raises:
        ExportError: the model does not record its normalisation.
    """
    model = inner(model)
    refuse_wrapped(model)
    plain = copy.deepcopy(model, shared_records(model)).to("cpu", torch.float32).eval()
    plain.requires_grad_(False)
    if not normalise:
        return plain
    mean, std = normalisation(model)
    return Normalised(plain, mean, std).eval()


def normalisation(model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """Returns mean and standard deviation of each channel of the images, in units of [0, 1], from the model's pretrained_cfg.

    Raises:
        ExportError: there are none.
    """
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    if not cfg.get("mean") or not cfg.get("std"):
        raise ExportError(f"{type(model).__name__} has no mean and std in its pretrained_cfg to normalise images with")
    channels = input_shape(model)[0]
    return fit_channels(cfg["mean"], channels), fit_channels(cfg["std"], channels)


def capture(model: nn.Module, dynamic_img_size: bool = False) -> torch.export.ExportedProgram:
    """Records a model for any number of images.

    Args:
        model: see ``served``; maps (B, channels, H, W) to one tensor.
        dynamic_img_size: for images of any size too, in steps of ``size_step``, two of them at least.

    Raises:
        ExportError: the model has a fixed size, or torch can't record it.
    """
    inner = model.model if isinstance(model, Normalised) else model
    channels, height, width = input_shape(inner)
    sizes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if dynamic_img_size:
        down, across = size_step(inner)
        height, width = other_size(inner, (down, across))
        # torch takes one row of patches for a constant
        sizes |= {2: down * torch.export.Dim("rows", min=2), 3: across * torch.export.Dim("columns", min=2)}
    image = torch.rand(TRACED_BATCH, channels, height, width)
    try:
        with torch.no_grad():
            program = torch.export.export(model, (image,), dynamic_shapes=(sizes,), strict=False)
    except Exception as error:
        what = "for images of any size" if dynamic_img_size else "for any number of images"
        raise ExportError(
            f"torch.export can't record this {type(inner).__name__} {what}: {first_line(error)}"
        ) from None
    outputs = program.graph_signature.user_outputs
    if len(outputs) != 1:
        raise ExportError(f"{type(inner).__name__} returns {len(outputs)} outputs for an image, one tensor is needed")
    if dynamic_img_size:
        refuse_one_size(program, inner)
    return program


def refuse_one_size(program: torch.export.ExportedProgram, model: nn.Module) -> None:
    """Raises ExportError where torch has recorded the model for the one size that it saw, and said nothing."""
    count, height, width = sizes_to_compare(model, True)[1]
    try:
        with torch.no_grad():
            program.module()(torch.rand(count, input_shape(model)[0], height, width))
    except Exception as error:
        raise ExportError(
            f"this {type(model).__name__} accepts images of any size, but torch.export records one only: {first_line(error)}"
        ) from None


def first_line(error: Exception) -> str:
    """Returns the first line of an error that is not empty; its class without one."""
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)
