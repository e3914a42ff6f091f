"""Masks of the scores, as scaled_dot_product_attention reads them: boolean (True: attend), additive, or causal order.

A query that may attend to nothing gets zeros and passes no gradient on, in every backend: its softmax is over an empty set.
"""

import torch
from torch import Tensor

from vit_tucker.errors import PatchError


@torch.fx.wrap
def add_mask(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Returns scores with a boolean, additive or causal mask.

    Args:
        scores: (B, H, N, N).
        attn_mask: boolean (True: attend) or additive, broadcasts to (B, H, N, N); None for none.
        is_causal: instead of the mask, attend to earlier tokens and the token itself.
    """
    if is_causal:
        tokens = scores.shape[-1]
        return scores + scores.new_full((tokens, tokens), float("-inf")).triu(1)
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, float("-inf"))
    return scores + attn_mask


def masked_softmax(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Returns softmax(scores + mask), (B, H, N, N), with rows of zeros where nothing may be attended to.

    Arguments as of ``add_mask``; works on fx proxies.
    """
    maps, blind = open_softmax(scores, attn_mask, is_causal)
    return maps if blind is None else zero_rows(maps, blind)


def open_softmax(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> tuple[Tensor, Tensor | None]:
    """Returns softmax(scores + mask), finite everywhere, and the rows that are to be zeros, (..., 1), for outputs as well.

    Arguments as of ``add_mask``.
    """
    if attn_mask is None:
        return add_mask(scores, attn_mask, is_causal).softmax(dim=-1), None
    blind = _blind_rows(attn_mask, is_causal)
    return add_mask(scores, _open_rows(attn_mask, blind), is_causal).softmax(dim=-1), blind


def zero_blind_rows(y: Tensor, attn_mask: Tensor, is_causal: bool) -> Tensor:
    """Returns heads' outputs with zeros for tokens that may attend to nothing.

    Args:
        y: (B, H, N, D).
        attn_mask, is_causal: as of ``add_mask``, the mask broadcasts to (B, H, N, N).
    """
    return zero_rows(y, _blind_rows(attn_mask, is_causal))


@torch.fx.wrap
def for_blind_rows(attn_mask: Tensor | None, is_causal: bool, each: Tensor, images: int, num_tokens: int) -> Tensor:
    """Returns the sum (B, N, O) of what the heads add to tokens that may attend to nothing, zeros for other tokens.

    Args:
        attn_mask, is_causal: as of ``add_mask``, the mask broadcasts to (B, H, N, N).
        each: a row for each head, (H, O).
        images, num_tokens: B, N.
    """
    blind = _blind_rows(attn_mask, is_causal)
    if blind is None:
        return each.new_zeros(images, num_tokens, each.shape[1])
    heads = blind.expand(images, each.shape[0], num_tokens, 1).squeeze(-1)
    return heads.transpose(1, 2).to(each.dtype) @ each


@torch.fx.wrap
def cast_mask(attn_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Returns the mask in the layer's dtype, as kernels read it; boolean ones stay.

    Args:
        attn_mask: boolean or floating point, broadcasts to (B, H, N, N); None for none.
        x: (B, N, C) tokens of the layer's dtype.

    Raises:
        PatchError: the mask holds integers.
    """
    if attn_mask is None or attn_mask.dtype == x.dtype or attn_mask.dtype == torch.bool:
        return attn_mask
    if not attn_mask.is_floating_point():
        raise PatchError(
            f"attn_mask is {str(attn_mask.dtype).removeprefix('torch.')}; it must be bool (True: attend), as mask.bool() makes"
            f" it, or floating point, added to the scores"
        )
    return attn_mask.to(x.dtype)


@torch.fx.wrap
def _blind_rows(attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """Returns which rows of a mask (..., N) allow nothing, (..., 1); None without a mask, or in causal order."""
    if attn_mask is None or is_causal:
        return None
    if attn_mask.dtype == torch.bool:
        return ~attn_mask.any(-1, keepdim=True)
    return attn_mask.detach().amax(-1, keepdim=True) == float("-inf")


@torch.fx.wrap
def _open_rows(attn_mask: Tensor, blind: Tensor | None) -> Tensor:
    """Opens these rows of the mask, so that their softmax and its gradients are finite."""
    if blind is None:
        return attn_mask
    if attn_mask.dtype == torch.bool:
        return attn_mask | blind
    return attn_mask.masked_fill(blind, 0.0)


@torch.fx.wrap
def zero_rows(y: Tensor, blind: Tensor | None) -> Tensor:
    """Returns maps or heads' outputs (B, H, N, ...) with zeros in these rows (..., 1), if there are any."""
    return y if blind is None else y.masked_fill(blind, 0.0)
