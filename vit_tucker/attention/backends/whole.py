"""Tucker Attention between its projections, by any backend: in one go where it can, else head by head."""

from __future__ import annotations

import torch
from torch import Tensor

from vit_tucker.attention.backends.base import Facts, mask_facts, own_only
from vit_tucker.attention.backends.registry import choose, get_backend
from vit_tucker.attention.rope import rotate

MANY_TOKENS = 1024
"""Of a batch: below, a training step with a dense layer's attention takes some ten megabytes."""


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
    """sum_i softmax(scale * P T_i K^T + mask) V S_i^T (arXiv 2603.30033, Eqs 2-6).

    Args:
        p, k, v: (B, N, r2), (B, N, r3), (B, N, r3t).
        pre, post: T (H, r2, r3) and S (H, r2t, r3t).
        attn_mask: boolean (True: attend) or additive, broadcasts to (B, H, N, N).
        is_causal: attend to earlier tokens and the token itself; takes precedence over the mask.
        scale: factor on the scores.
        dropout: rate of the attention weights.
        angles: sines and cosines by which the queries rotate, each (N, r3/2) or (B, N, r3/2); the keys are rotated already.
        backend: name of a backend, or "auto".

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
    """A leaf in fx graphs: the choice depends on tensors."""
    mask, mask_grad = mask_facts(attn_mask, is_causal)
    tensors = (p, k, v, pre, post)
    angles_grad = torch.is_grad_enabled() and angles is not None and any(angle.requires_grad for angle in angles)
    grad = torch.is_grad_enabled() and (mask_grad or any(t.requires_grad for t in tensors))
    ranks = (p.shape[2], k.shape[2], post.shape[1], v.shape[2])
    facts = Facts(p.device.type, p.dtype, pre.shape[0], 1, k.shape[2], v.shape[2],
                  mask, mask_grad, dropout, grad, own_only(), ranks, angles_grad,
                  keeps_more(ranks, pre.shape[0], scale) and many_tokens(p))  # fmt: skip
    chosen = get_backend(choose(facts, backend).name)
    p, k, v, pre, post = (t.to(p.dtype) for t in tensors)
    if chosen.whole is not None:
        return chosen.whole(p, k, v, pre, post, attn_mask, is_causal, scale, angles)
    assert chosen.attend is not None
    q = (p @ pre.transpose(0, 1).flatten(1)).unflatten(2, (pre.shape[0], -1))  # (B, N, H, r3)
    if angles is not None:
        q = rotate(q, *(angle.unsqueeze(-2) for angle in angles))
    y = chosen.attend(q.transpose(1, 2), k.unsqueeze(1), v.unsqueeze(1), attn_mask, is_causal, scale, dropout)
    return y.transpose(1, 2).flatten(2) @ post.transpose(1, 2).flatten(0, 1)


def keeps_more(ranks: tuple[int, int, int, int], heads: int, scale: float) -> bool:
    """See ``Facts``: whether p, k, v and all heads' queries and outputs are more than 4 H D numbers; the scale is 1 / sqrt(D)."""
    r2, r3, _, r3t = ranks
    return r2 + r3 + r3t + 2 * heads * max(r3, r3t) > 4 * heads / scale**2


def many_tokens(p: Tensor) -> bool:
    """Whether memory matters: for few tokens forming queries twice costs more than the rest gains. Open numbers count as many."""
    return torch.compiler.is_compiling() or p.shape[0] * p.shape[1] >= MANY_TOKENS
