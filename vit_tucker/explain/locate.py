"""Finds out where the tokens of an attention layer lie, from the shapes of a call and the modules around the layer.

Nothing here names a class of timm: a parent with a window size and a shift cuts windows, whatever it is called. A layer whose
sequences fit none of the rules has no known geometry; its maps are maps all the same.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn

from vit_tucker.explain.grid import TokenGrid, strided_grid, whole_grid, window_grid

Shape = tuple[int, ...]


class CallSite(NamedTuple):
    """The facts of one call of an attention layer by which its tokens are located.

    Attributes:
        name: full name of the layer.
        sequences, tokens: S sequences per image, n tokens in each.
        shape: of the layer's input.
        layout: of the layer's input, see ``HostSpec``.
        around: the modules that hold the layer, the nearest first, with the shapes of their inputs.
        prefixes: numbers of prefix tokens to consider, the likeliest first.
        image: height and width of the image in pixels.
    """

    name: str
    sequences: int
    tokens: int
    shape: Shape
    layout: str
    around: Sequence[tuple[nn.Module, Shape]]
    prefixes: Sequence[int]
    image: tuple[int, int]


def locate(place: CallSite) -> TokenGrid | None:
    """Returns the grid of the layer's tokens; None if it can't be known."""
    for rule in RULES:
        grid = rule(place)
        if grid is not None and tuple(grid.index.shape) == (place.sequences, place.tokens):
            return grid
    return None


def pair(value: Any) -> tuple[int, int]:
    """Returns (3, 3) for 3."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def sizes(shape: Shape, channels: int) -> list[tuple[int, int]]:
    """Returns height and width of a (B, H, W, C) or (B, C, H, W) tensor with so many channels; both readings where both fit."""
    if len(shape) != 4:
        return []
    readings = ((shape[3], (shape[1], shape[2])), (shape[1], (shape[2], shape[3])))
    return [size for width, size in readings if width == channels]


def token_channels(place: CallSite) -> int:
    """Returns the width of the tokens."""
    return place.shape[1] if place.layout == "channels_first" else place.shape[-1]


def windows(place: CallSite) -> TokenGrid | None:
    """Reads windows of Swin, SAM, DaViT: the parent has a window size, and a shift if it shifts."""
    parent, shape = place.around[0]
    size = getattr(parent, "window_size", None)
    if not size or isinstance(size, nn.Module):
        return None
    window, shift = pair(size), pair(getattr(parent, "shift_size", 0))
    grids = [window_grid(h, w, window, shift) for h, w in sizes(shape, token_channels(place))]
    return next((grid for grid in grids if len(grid.index) == place.sequences), None)


def partitions(place: CallSite) -> TokenGrid | None:
    """Reads partitions of MaxViT: the parent cuts blocks, or grids of tokens that lie far apart."""
    parent, shape = place.around[0]
    size = getattr(parent, "partition_size", None)
    if size is None:
        return None
    own_name = place.name.rpartition(".")[2]
    blocks = getattr(parent, "partition_block", own_name != "attn_grid")
    cut: Callable[..., TokenGrid] = window_grid if blocks else strided_grid
    found = sizes(shape, token_channels(place))
    return cut(*found[0], pair(size)) if found else None


def stacked_blocks(place: CallSite) -> TokenGrid | None:
    """Reads NesT's square blocks, which have a dimension of their own, (B, S, n, C)."""
    if place.layout != "sequence" or len(place.shape) != 4:
        return None
    across, side = math.isqrt(place.sequences), math.isqrt(place.tokens)
    if across**2 != place.sequences or side**2 != place.tokens:
        return None
    return window_grid(across * side, across * side, (side, side))


def interleaved_patches(place: CallSite) -> TokenGrid | None:
    """Reads MobileViT's sequences, one for each position within the patches."""
    for module, shape in place.around:
        if getattr(module, "patch_area", None) == place.sequences and len(shape) == 4:
            patch = pair(module.patch_size)
            rows, columns = (math.ceil(n / p) for n, p in zip(shape[2:], patch, strict=True))
            return strided_grid(rows * patch[0], columns * patch[1], (rows, columns))
    return None


def pixels_of_patches(place: CallSite) -> TokenGrid | None:
    """Reads TNT's inner attention: a sequence for each patch, of its pixels."""
    side = math.isqrt(place.tokens)
    if not hasattr(place.around[0][0], "attn_in") or side**2 != place.tokens:
        return None
    rows, columns = proportional(place.sequences, place.image) or (0, 0)
    grid = window_grid(rows * side, columns * side, (side, side))
    return TokenGrid(grid.height, grid.width, 0, grid.index, within_patch=True)


def feature_map(place: CallSite) -> TokenGrid | None:
    """Reads tokens that come as (B, H, W, C) or (B, C, H, W)."""
    if place.sequences != 1 or place.layout == "sequence" or len(place.shape) != 4:
        return None
    height, width = place.shape[2:] if place.layout == "channels_first" else place.shape[1:3]
    return whole_grid(height, width)


def sequence(place: CallSite) -> TokenGrid | None:
    """Reads tokens that come as (B, N, C), prefix tokens first, then patches in the proportions of the image."""
    if place.sequences != 1:
        return None
    for num_prefix in place.prefixes:
        size = proportional(place.tokens - num_prefix, place.image)
        if size is not None:
            return whole_grid(*size, num_prefix)
    return None


def proportional(count: int, image: tuple[int, int]) -> tuple[int, int] | None:
    """Returns rows and columns of so many patches in an image; None if it can't be cut into as many.

    Patches are square, and parts of them at the right and lower edges are left out everywhere or nowhere.
    """
    near = math.sqrt(max(count, 1) * image[0] / image[1])
    for rows in (round(near), math.floor(near), math.ceil(near)):
        if rows and count > 0 and count % rows == 0 and fits((rows, count // rows), image):
            return rows, count // rows
    return None


def fits(grid: tuple[int, int], image: tuple[int, int]) -> bool:
    """Returns whether patches of one size give so many rows and columns, by rounding both down or both up."""
    most = [side / n for side, n in zip(image, grid, strict=True)]  # patch sizes for which nothing is left over
    down = max(side / (n + 1) for side, n in zip(image, grid, strict=True)) < min(most)
    up = max(most) < min(side / (n - 1) if n > 1 else math.inf for side, n in zip(image, grid, strict=True))
    return down or up


RULES = (partitions, windows, stacked_blocks, interleaved_patches, pixels_of_patches, feature_map, sequence)
