"""Attention rollout: how much of each patch reaches what the model reads out, over all layers.

    A_l <- (A_l + I) / 2 with rows that sum to 1,   rollout = A_L ... A_2 A_1
Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers, arXiv 2005.00928, Eq 1. Fusion by maximum and minimum and
the discarded share are vit-explain's (github.com/jacobgil/vit-explain), with rows normalised after them.

Products run from the output to the input, on the rows that are asked for only, so that windows of large images cost no more than
their maps.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from vit_tucker.errors import ExplainError, nearest
from vit_tucker.explain.grid import TokenGrid


class RolloutError(ExplainError):
    """Rollout is not defined for a model; the message gives the reason."""


Fusion = Literal["mean", "max", "min"]
FUSIONS: dict[str, Callable[[Tensor, int], Tensor]] = {"mean": Tensor.mean, "max": Tensor.amax, "min": Tensor.amin}


def fuse_heads(attn: Tensor, fusion: Fusion = "mean") -> Tensor:
    """Returns one map for all heads, (B, N, N): their mean, maximum or minimum.

    Args:
        attn: (B, H, N, N).
        fusion: "mean", "max" or "min".

    Raises:
        ExplainError: another fusion.
    """
    if fusion not in FUSIONS:
        raise ExplainError(f"head fusion '{fusion}': one of {', '.join(FUSIONS)}{nearest(fusion, FUSIONS)}")
    return FUSIONS[fusion](attn, 1)


def discard(fused: Tensor, ratio: float, keep_first: bool = False) -> Tensor:
    """Sets the smallest entries of each image's map to 0.

    Args:
        fused: (B, S, n, n), the S sequences of an image.
        ratio: share of the entries, in [0, 1).
        keep_first: the first token's attention to itself stays, as in vit-explain (the class token).

    Raises:
        ExplainError: a ratio outside [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ExplainError(f"discard ratio {ratio:g}: must be at least 0 and below 1")
    flat = fused.flatten(1)
    smallest = flat.topk(int(flat.shape[1] * ratio), largest=False).indices
    kept = flat.scatter(1, smallest, 0.0)
    if keep_first:
        kept[:, 0] = flat[:, 0]
    return kept.view_as(fused)


def with_residual(fused: Tensor) -> Tensor:
    """Returns (A + I) / 2 with rows that sum to 1: attention and the skip connection around it.

    Args:
        fused: A, (..., n, n).
    """
    both = (fused + torch.eye(fused.shape[-1], dtype=fused.dtype, device=fused.device)) / 2
    return both / both.sum(-1, keepdim=True)


def attention_rollout(
    maps: Mapping[str, Tensor] | Sequence[Tensor],
    *,
    head_fusion: Fusion = "mean",
    discard_ratio: float = 0.0,
    start: Tensor | None = None,
) -> Tensor:
    """Computes rollout over layers in which all tokens of an image attend to each other, see the module.

    Args:
        maps: of the layers from the first to the last, (B, H, N, N) each, as ``attention_maps`` gives them.
        head_fusion: mean, max or min over heads.
        discard_ratio: share of each map's smallest entries that are set to 0 first.
        start: (R, N) or (B, R, N), rows to follow from the output back to the input, such as the class token's; all if None.

    Returns:
        (B, N, N), row i: how much of each input token is in output token i; (B, R, N) with ``start``. Rows sum to 1 if those
        of ``start`` do.

    Raises:
        ExplainError: no maps, maps of different numbers of tokens (windows, stages), or bad options.
    """
    layers = list(maps.values()) if isinstance(maps, Mapping) else list(maps)
    if not layers:
        raise ExplainError("rollout: no maps")
    if len({(attn.shape[0], *attn.shape[-2:]) for attn in layers}) != 1:
        shapes = ", ".join(dict.fromkeys(str(tuple(attn.shape)) for attn in layers))
        raise ExplainError(
            f"rollout: the layers see different tokens ({shapes}); explain_image stitches windows and stages"
        )
    batch, tokens = layers[0].shape[0], layers[0].shape[-1]
    rows = torch.eye(tokens, dtype=layers[0].dtype, device=layers[0].device) if start is None else start
    rows = rows.to(layers[0]).expand(batch, *rows.shape[-2:])
    for attn in reversed(layers):
        fused = discard(fuse_heads(attn, head_fusion)[:, None], discard_ratio, keep_first=True)
        rows = rows @ with_residual(fused[:, 0])
    return rows


def roll_back(
    rows: Tensor, fused: Tensor, grid: TokenGrid, discard_ratio: float = 0.0, normalised: bool = True
) -> Tensor:
    """Computes one step of rollout through a layer, whatever its sequences; what goes to padding is lost.

    Args:
        rows: (B, R, T), shares of the layer's outputs, T tokens of an image; those of its inputs are returned.
        fused: (B * S, n, n).
        grid: of the layer.
        discard_ratio: see ``attention_rollout``.
        normalised: by (A + I) / 2, else by A + I.
    """
    if grid.within_patch:
        return rows
    maps = discard(fused.unflatten(0, (rows.shape[0], -1)), discard_ratio, keep_first=grid.is_whole)
    parts = torch.einsum("brsi,bsij->brsj", grid.gather(rows), with_residual(maps) if normalised else maps)
    return grid.scatter(parts) if normalised else rows + grid.scatter(parts)


def spread_rows(rows: Tensor, coarse: TokenGrid, fine: TokenGrid) -> Tensor:
    """Spreads shares of merged patches evenly over the patches that were merged, (B, R, T').

    A class token that joins the patches between both layers (ConViT) keeps its share.

    Args:
        rows: (B, R, T) of the later layer's tokens.
        coarse, fine: grids of the later and of the earlier layer.

    Raises:
        RolloutError: the one does not come from the other by merging whole patches.
    """
    if (coarse.height, coarse.width, coarse.num_prefix) == (fine.height, fine.width, fine.num_prefix):
        return rows
    if (coarse.height, coarse.width, fine.num_prefix) == (fine.height, fine.width, 0):
        return rows[..., coarse.num_prefix :]
    factors = math.ceil(fine.height / coarse.height), math.ceil(fine.width / coarse.width)
    merged = math.ceil(fine.height / factors[0]), math.ceil(fine.width / factors[1])
    if coarse.num_prefix or fine.num_prefix or merged != (coarse.height, coarse.width):
        raise RolloutError(f"{fine.height}x{fine.width} tokens can't be merged into {coarse.height}x{coarse.width}")
    row = torch.arange(fine.height) // factors[0]
    column = torch.arange(fine.width) // factors[1]
    parents = (row[:, None] * coarse.width + column).flatten()  # (T',)
    members = torch.bincount(parents, minlength=coarse.height * coarse.width)
    return (rows / members.to(rows))[..., parents]
