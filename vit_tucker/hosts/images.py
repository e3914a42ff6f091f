"""Finds the channels and size of the images that a timm model accepts."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from vit_tucker.hosts.dry_run import dry_run
from vit_tucker.hosts.structure import structure_copy

SQUARES = range(32, 1025, 16)
"""Sides in pixels that are tried for a model of one fixed size that names none; smaller ones would run by broadcasting."""


def input_shape(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> tuple[int, int, int]:
    """Returns channels, height and width of a model's images: from ``img_size``, from its build, or from its pretrained_cfg."""
    channels, *usual = pretrained_cfg(model).get("input_size", (3, 224, 224))
    height, width = as_pair(img_size) or built_size(model) or usual
    return input_channels(model) or channels, height, width


def built_size(model: nn.Module) -> tuple[int, int] | None:
    """Returns height and width of the images that a model was built for; None if its pretrained_cfg is all there is to go by.

    The patch embedding's own size is taken as it is. Other records count if the model runs at that size, since some
    architectures ignore ``img_size``. Older timm keeps no record of some families (VOLO, LeViT, CoAtNet, ...): of a model
    with one fixed size, squares are tried then.
    """
    if embedded := as_pair(getattr(getattr(model, "patch_embed", None), "img_size", None)):
        return embedded
    cfg = pretrained_cfg(model)
    _, *sides = cfg.get("input_size", (3, 224, 224))
    usual = (sides[0], sides[1])
    if records := recorded_sizes(model):
        if records[0] == usual:
            return records[0]
        return next((size for size in (*records, usual) if runs_at(model, size)), records[0])
    if "_traits" in vars(model) or cfg.get("fixed_input_size") is False or runs_at(model, usual):
        return None
    return next(((side, side) for side in SQUARES if runs_at(model, (side, side))), None)


def recorded_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """Returns the image sizes that a model names, the most reliable first.

    That is what timm keeps of the model, its own attribute or its first layer with one (of TNT, CoaT, Twins), and the arguments
    that
    it was made with.
    """
    traits, arguments = (vars(model).get(name) or {} for name in ("_traits", "_model_args"))
    layers = (as_pair(getattr(module, "img_size", None)) for module in model.modules())
    found = (as_pair(traits.get("img_size")), next(filter(None, layers), None), as_pair(arguments.get("img_size")))
    return [size for size in dict.fromkeys(found) if size is not None]


def runs_at(model: nn.Module, size: tuple[int, int]) -> bool:
    """Returns whether a model accepts images of this height and width; True if it can't run without values."""
    structure = structure_copy(model)
    try:
        dry_run(structure, (input_channels(model) or 3, *size))
    except NotImplementedError:
        return True
    except Exception:
        return False
    return True


def as_pair(size: Any) -> tuple[int, int] | None:
    """Returns a size in pixels, one number or two, as height and width; None for anything else."""
    if isinstance(size, int) and size > 0:
        return size, size
    if isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(side, int) for side in size):
        return size[0], size[1]
    return None


def pretrained_cfg(model: nn.Module) -> Mapping[str, Any]:
    """Returns timm's record of a model's weights and images; nothing for a model that is not timm's."""
    return getattr(model, "pretrained_cfg", None) or {}


def input_channels(model: nn.Module) -> int | None:
    """Returns the channels of the model's first convolution, None if the images go through something else first.

    It is the convolution that pretrained_cfg names, else the first there is.
    """
    config = pretrained_cfg(model)
    modules = dict(model.named_modules())
    if "first_conv" in config:
        names = config["first_conv"] or ()
        stem = [modules.get(name) for name in ([names] if isinstance(names, str) else names)]
    else:
        stem = list(modules.values())
    return next((module.in_channels for module in stem if isinstance(module, nn.Conv2d)), None)
