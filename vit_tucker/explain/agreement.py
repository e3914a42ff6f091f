"""Measures how far the attention of two models agrees on the same image, layer by layer and head by head."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vit_tucker.conversion.observe import groups_within
from vit_tucker.errors import ExplainError
from vit_tucker.explain.capture import record_attention
from vit_tucker.explain.grid import PADDING

MAP_BYTES = 2**30
"""Maps of both models that are in memory at a time; a single layer always is."""


class HeadAgreement(NamedTuple):
    """Agreement of one head's map between two models.

    Attributes:
        layer: full name.
        head: its number.
        total_variation: mean over queries of half the summed absolute differences: the share of attention that goes elsewhere,
            0 (the same) to 1 (nothing in common).
        cosine: of the two maps as vectors, 0 to 1 (the same).
    """

    layer: str
    head: int
    total_variation: float
    cosine: float


def total_variation(a: Tensor, b: Tensor, queries: Tensor | None = None) -> Tensor:
    """Returns the mean over queries of the total variation distance of two maps' rows, (H,).

    Args:
        a, b: maps, (S, H, n, n).
        queries: (S, n) boolean, the queries that count; all if None.
    """
    distance = (a - b).abs().sum(-1) / 2  # (S, H, n)
    return distance.mean((0, 2)) if queries is None else distance.transpose(0, 1)[:, queries].mean(1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Returns the cosine of two maps of each head as vectors, (H,).

    Args:
        a, b: maps, (S, H, n, n).
    """
    one, other = (x.transpose(0, 1).flatten(1) for x in (a, b))
    return torch.nn.functional.cosine_similarity(one, other, dim=1)


def compare_attention(
    dense: tuple[nn.Module, Tensor],
    patched: tuple[nn.Module, Tensor],
    layers: Sequence[str],
    map_bytes: Mapping[str, int],
) -> list[HeadAgreement]:
    """Compares two models' attention on one image, in groups of layers whose maps fit into ``MAP_BYTES``.

    Args:
        dense, patched: models with the same layers and tokens, each with the image as it takes it, (channels, height, width).
        layers: full names.
        map_bytes: memory of each layer's map.

    Raises:
        ExplainError: a layer is not in both models, or has other heads or tokens.
    """
    rows = []
    for names in groups_within(layers, lambda name: 2 * map_bytes.get(name, 0), MAP_BYTES):
        one, other = (record_attention(model, image[None], names) for model, image in (dense, patched))
        for name in names:
            a, b = (recording.maps[name].float() for recording in (one, other))
            if a.shape != b.shape:
                raise ExplainError(f"{name}: maps of {shape(a)} and of {shape(b)} can't be compared")
            grid = one.grids[name]
            distances = total_variation(a, b, None if grid is None else grid.index != PADDING)
            both = zip(distances.tolist(), cosine(a, b).tolist(), strict=True)
            rows += [HeadAgreement(name, head, *values) for head, values in enumerate(both)]
    return rows


def shape(attn: Tensor) -> str:
    """Returns the size of maps ``attn`` (S, H, n, n) in words, such as '3 heads and 197 tokens'."""
    return f"{attn.shape[1]} heads and {attn.shape[-1]} tokens"
