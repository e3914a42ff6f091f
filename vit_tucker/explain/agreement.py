"""How far the attention of two models agrees on the same image, layer by layer and head by head."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vit_tucker.errors import ExplainError
from vit_tucker.explain.capture import record_attention
from vit_tucker.explain.grid import PADDING, TokenGrid

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
    """Mean over queries of the total variation distance of two maps' rows. (S, H, n, n) twice -> (H,)

    Args:
        a, b: maps, (S, H, n, n).
        queries: (S, n) boolean, the queries that count; all if None.
    """
    distance = (a - b).abs().sum(-1) / 2  # (S, H, n)
    if queries is None:
        return distance.mean((0, 2))
    return distance.transpose(0, 1)[:, queries].mean(1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of two maps of each head as vectors. (S, H, n, n) twice -> (H,)"""
    one, other = (x.transpose(0, 1).flatten(1) for x in (a, b))
    return torch.nn.functional.cosine_similarity(one, other, dim=1)


def compare_attention(
    dense: tuple[nn.Module, Tensor],
    patched: tuple[nn.Module, Tensor],
    layers: Sequence[str],
    map_bytes: Mapping[str, int],
) -> list[HeadAgreement]:
    """Compare two models' attention on one image. Layers are worked off in groups whose maps fit into ``MAP_BYTES``.

    Args:
        dense, patched: models with the same layers and tokens, each with the image as it takes it, (channels, height, width).
        layers: full names.
        map_bytes: memory of each layer's map.

    Raises:
        ExplainError: a layer is not in both models, or has other heads or tokens.
    """
    rows = []
    for names in layers_within_memory(layers, map_bytes):
        one, other = (record_attention(model, image[None], names) for model, image in (dense, patched))
        for name in names:
            a, b = (recording.maps[name].float() for recording in (one, other))
            if a.shape != b.shape:
                raise ExplainError(f"{name}: maps of {shape(a)} and of {shape(b)} can't be compared")
            values = total_variation(a, b, real_queries(one.grids[name])), cosine(a, b)
            rows += [
                HeadAgreement(name, i, tv, cos)
                for i, (tv, cos) in enumerate(zip(*map(Tensor.tolist, values), strict=True))
            ]
    return rows


def real_queries(grid: TokenGrid | None) -> Tensor | None:
    """(S, n) boolean: tokens that are no padding."""
    return None if grid is None else grid.index != PADDING


def shape(attn: Tensor) -> str:
    """'3 heads and 197 tokens'"""
    return f"{attn.shape[1]} heads and {attn.shape[-1]} tokens"


def layers_within_memory(layers: Sequence[str], map_bytes: Mapping[str, int]) -> Iterator[list[str]]:
    """The layers in order, in groups whose maps, of two models, fit into ``MAP_BYTES``."""
    group: list[str] = []
    used = 0
    for name in layers:
        needed = 2 * map_bytes.get(name, 0)
        if group and used + needed > MAP_BYTES:
            yield group
            group, used = [], 0
        group.append(name)
        used += needed
    if group:
        yield group
