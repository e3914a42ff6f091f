"""Reads how a host's blocks call their attention: layouts of the tokens, masks, and biases of the scores by relative position."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vit_tucker.attention.backends import masks


class Call(NamedTuple):
    """The arguments of an attention layer in one form for all hosts.

    Attributes:
        x: tokens, (B, N, C).
        attn_mask: boolean (True: attend) or additive, broadcasts to (B, H, N, N); position biases are in it.
        is_causal: attend to earlier tokens and the token itself only.
        rope: table of sines and cosines, see ``vit_tucker.attention.rope``.
        may_be_blind: the caller gave a mask, by which a token may have nothing to attend to; position biases leave all open.
    """

    x: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False
    rope: Tensor | None = None
    may_be_blind: bool = False


class PositionBias(nn.Module):
    """A host's relative position bias, an addition to the scores.

    Args:
        source: the part of the host that makes the bias, with its parameters and buffers.
        method: name of its method that returns the bias, (1, H, N, N) or (H, N, N).
    """

    def __init__(self, source: nn.Module, method: str) -> None:
        super().__init__()
        self.source = source
        self.method = method

    def forward(self) -> Tensor:
        """Returns the bias, (1, H, N, N) or (H, N, N)."""
        bias: Tensor = getattr(self.source, self.method)()
        return bias

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Resizes to another grid of tokens, as the host does."""
        source: Any = self.source
        source.set_window_size(window_size)


@torch.fx.wrap
def to_sequences(x: Tensor, layout: str) -> Tensor:
    """Returns tokens of a host as (B, N, C); see ``HostSpec.layout``."""
    if layout == "channels_first":
        return x.flatten(2).transpose(1, 2)
    if x.ndim == 3:
        return x
    return x.flatten(1, -2) if layout == "grid" else x.flatten(0, -3)


@torch.fx.wrap
def from_sequences(y: Tensor, like: Tensor, layout: str) -> Tensor:
    """Returns outputs in the layout of the host's tokens.

    Args:
        y: (B, N, O).
        like: the host's tokens, (B, N, C) in its layout.
        layout: see ``HostSpec.layout``.
    """
    if layout == "channels_first":
        return y.transpose(1, 2).unflatten(2, like.shape[2:])
    return y if like.ndim == 3 else y.reshape(*like.shape[:-1], -1)


@torch.fx.wrap
def _score_mask(
    attn_mask: Tensor | None,
    is_causal: bool,
    window_mask: Tensor | None,
    shared_bias: Tensor | None,
    position_bias: Tensor | None,
    x: Tensor,
) -> tuple[Tensor | None, bool]:
    """Adds up everything that is added to the scores, as one mask, and whether they are causal besides. A leaf in fx graphs.

    Args:
        attn_mask: boolean or additive, broadcasts to (B, H, N, N).
        is_causal: takes precedence over ``attn_mask``.
        window_mask: (W, N, N), additive, one for each of W windows of an image (shifted windows).
        shared_bias: (1, H, N, N) or (H, N, N), from the model.
        position_bias: the same, the layer's own.
        x: tokens (B, N, C).
    """
    biases = [bias for bias in (shared_bias, position_bias) if bias is not None]
    if window_mask is not None:
        biases.append(window_mask.repeat(x.shape[0] // window_mask.shape[0], 1, 1).unsqueeze(1))
    if not biases:
        return attn_mask, is_causal
    total = biases[0]
    for bias in biases[1:]:
        total = total + bias
    if total.ndim == 3:
        total = total.unsqueeze(0)
    if attn_mask is not None or is_causal:
        total = masks.add_mask(total, attn_mask, is_causal)
    return total.to(x.dtype), False


def read_call(
    layout: str,
    position_bias: PositionBias | None,
    x: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    rope: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    shared_rel_pos: Tensor | None = None,
    shared_rel_pos_bias: Tensor | None = None,
) -> Call:
    """Reads the arguments of a host's attention, under the names that timm's blocks use, into one form.

    Args:
        layout: of the host's tokens, see ``HostSpec``.
        position_bias: the layer's own.
        x: (B, N, C) tokens in that layout.
        attn_mask: boolean (True: attend) or additive, broadcasts to (B, H, N, N).
        is_causal: attend to earlier tokens and the token itself.
        rope: (N', 2 D) or (B, N', 2 D) table of the call, see ``vit_tucker.attention.rope``.
        mask: (W, N, N), additive, of each window of an image (Swin).
        shared_rel_pos, shared_rel_pos_bias: additive bias from the model (ViTs with relative positions, BEiT), broadcasts to
            (B, H, N, N).
    """
    tokens = to_sequences(x, layout)
    if attn_mask is not None:
        attn_mask = masks.cast_mask(attn_mask, tokens)
    shared = shared_rel_pos if shared_rel_pos_bias is None else shared_rel_pos_bias
    own = None if position_bias is None else position_bias()
    masked = attn_mask is not None
    if own is not None or mask is not None or shared is not None:
        attn_mask, is_causal = _score_mask(attn_mask, is_causal, mask, shared, own, tokens)
    return Call(tokens, attn_mask, is_causal, rope, masked)
