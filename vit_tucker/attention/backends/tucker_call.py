"""Tucker Attention between its projections, by any backend: in one go where it can, else head by head."""

from __future__ import annotations

import torch
from torch import Tensor

from vit_tucker.attention.backends.base import Facts, TuckerCall, device_type, drops, mask_facts
from vit_tucker.attention.backends.padding import cpu_width, pad_call
from vit_tucker.attention.backends.registry import choose, get_backend
from vit_tucker.attention.rope import rotate
from vit_tucker.attention.tracing import own_only

MANY_TOKENS = 1024
"""Of a batch: below, a training step with a dense layer's attention takes some ten megabytes, and forming queries twice costs
more than the rest gains."""


@torch.fx.wrap
def attend_whole(call: TuckerCall, backend: str) -> Tensor:
    """Returns z (B, N, r2t) by a backend or by "auto"; raises PatchError if the backend can't take the call."""
    facts = facts_of_call(call)
    chosen = get_backend(choose(facts, backend).name)
    call = pad_call(call, *chosen.widths(facts))
    dtype = call.p.dtype
    p, k, v, pre, post = (t if t.dtype == dtype else t.to(dtype) for t in call[:5])
    if chosen.whole is not None:
        return chosen.whole(call._replace(p=p, k=k, v=v, pre=pre, post=post))
    assert chosen.attend is not None
    q = (p @ pre.transpose(0, 1).flatten(1)).unflatten(2, (pre.shape[0], -1))  # (B, N, H, r3)
    if call.angles is not None:
        q = rotate(q, *(angle.unsqueeze(-2) for angle in call.angles))
    heads = q.transpose(1, 2), k.unsqueeze(1), v.unsqueeze(1)
    y = chosen.attend(*heads, call.attn_mask, call.is_causal, call.scale, call.dropout)
    return y.transpose(1, 2).flatten(2) @ post.transpose(1, 2).flatten(0, 1)


def facts_of_call(call: TuckerCall) -> Facts:
    """Returns the facts of a call."""
    p, k, v, pre, post = tensors = call[:5]
    mask, mask_grad = mask_facts(call.attn_mask, call.is_causal)
    recording = torch.is_grad_enabled()
    angles_grad = recording and call.angles is not None and any(angle.requires_grad for angle in call.angles)
    grad = recording and (mask_grad or any(t.requires_grad for t in tensors))
    ranks = (p.shape[2], k.shape[2], post.shape[1], v.shape[2])
    many = torch.compiler.is_compiling() or p.shape[0] * p.shape[1] >= MANY_TOKENS  # open numbers count as many
    more = keeps_more(ranks, pre.shape[0], call.scale) and many
    return Facts(device_type(p), p.dtype, pre.shape[0], 1, k.shape[2], v.shape[2],
                 mask, mask_grad, drops(call.dropout), grad, own_only(), ranks, angles_grad, more)  # fmt: skip


def keeps_more(ranks: tuple[int, int, int, int], heads: int, scale: float) -> bool:
    """Returns whether a backward pass keeps more numbers per token than dense attention does, which keeps 4 H D.

    Counted are p, k, v and all heads' queries and outputs, of the width that they are computed with.

    Args:
        ranks: r2, r3, r2t, r3t.
        heads: H.
        scale: of the softmax, 1 / sqrt(D).
    """
    r2, r3, _, r3t = ranks
    return r2 + r3 + r3t + 2 * heads * cpu_width(max(r3, r3t)) > 4 * heads / scale**2
