"""Backends that compute the whole of Tucker Attention between its projections: queries and outputs never reach memory."""

from __future__ import annotations

import torch
from torch import Tensor

from vit_tucker.attention.backends.base import Facts, exporting, mask_facts
from vit_tucker.attention.backends.registry import choose
from vit_tucker.attention.triton_tucker import tucker_attention


def attend_whole(
    p: Tensor,
    k: Tensor,
    v: Tensor,
    pre: Tensor,
    post: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout: float,
    angles: tuple[Tensor, Tensor] | None,
    backend: str,
) -> Tensor:
    """sum_i softmax(scale * P T_i K^T + mask) V S_i^T by the backend asked for.

    Args:
        p, k, v: (B, N, r2), (B, N, r3), (B, N, r3t).
        pre, post: T (H, r2, r3) and S (H, r2t, r3t).
        attn_mask: boolean (True: attend) or additive, broadcasts to (B, H, N, N).
        is_causal: attend to earlier tokens and the token itself; takes precedence over the mask.
        scale: factor on the scores.
        dropout: rate of the attention weights.
        angles: sines and cosines by which the queries rotate, each (N, r3/2) or (B, N, r3/2); the keys are rotated already.
        backend: name of a backend without ``attend``.

    Returns:
        (B, N, r2t).

    Raises:
        PatchError: the backend can't take the call.
    """
    return _attend_whole(p, k, v, pre, post, attn_mask, is_causal, scale, dropout, angles, backend)


@torch.fx.wrap
def _attend_whole(
    p: Tensor,
    k: Tensor,
    v: Tensor,
    pre: Tensor,
    post: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout: float,
    angles: tuple[Tensor, Tensor] | None,
    backend: str,
) -> Tensor:
    mask, mask_grad = mask_facts(attn_mask, is_causal)
    tensors = (p, k, v, pre, post)
    grad = torch.is_grad_enabled() and (mask_grad or any(t.requires_grad for t in tensors))
    ranks = (p.shape[2], k.shape[2], post.shape[1], v.shape[2])
    facts = Facts(p.device.type, p.dtype, len(pre), 1, k.shape[2], v.shape[2],
                  mask, mask_grad, dropout, grad, exporting(), ranks)  # fmt: skip
    choose(facts, backend)
    p, k, v, pre, post = (t.to(p.dtype) for t in tensors)
    return tucker_attention(p, k, v, pre, post, scale=scale, attn_mask=attn_mask, is_causal=is_causal, angles=angles)
