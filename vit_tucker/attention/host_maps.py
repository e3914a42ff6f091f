"""The attention maps of a host, and the gradients of its scores, recomputed from the tokens of a call."""

from typing import NamedTuple

import torch
from torch import Tensor

from vit_tucker.attention.backends.masks import masked_softmax
from vit_tucker.attention.host import HostSpec, MHAWeights
from vit_tucker.attention.moments import LayerCall
from vit_tucker.attention.rope import rotate_heads


class Maps(NamedTuple):
    """The attention maps of a call as its host computes them, and the gradients of the scores.

    Attributes:
        x, centred: tokens, and tokens less the shift, (B, N, C); those of padding are zero.
        probe: (B, N, O).
        p, s: softmax rows, and gradients of the scores, (B, H, N, N).
        q, k, probe_v: queries, keys, and gradients of the heads' averaged values, (B, H, N, D).
    """

    x: Tensor
    centred: Tensor
    probe: Tensor
    p: Tensor
    s: Tensor
    q: Tensor
    k: Tensor
    probe_v: Tensor


def host_maps(call: LayerCall, weights: MHAWeights, spec: HostSpec, shift: Tensor) -> Maps:
    """Returns the maps of a call, in the dtype of the weights.

    Args:
        call: with its probe.
        weights, spec: of the host.
        shift: (C,) subtracted from the tokens.
    """
    x, probe = call.x.to(shift.dtype), call.probe.to(shift.dtype)
    centred = x - shift
    if call.valid is not None:
        padding = ~call.valid.unsqueeze(-1)
        centred, probe = centred.masked_fill(padding, 0.0), probe.masked_fill(padding, 0.0)
    p, q, k = host_attention(x, weights, spec, call.attn_mask, call.is_causal, call.rope)
    v = heads_of(centred, weights.value)  # (B, H, N, D); the shift passes through the softmax unchanged
    probe_v = torch.einsum("bno,hdo->bhnd", probe, weights.out)  # gradient of the head's averaged value
    s = probe_v @ v.mT
    s = p * (s - (p * s).sum(-1, keepdim=True))  # gradient of the scores
    return Maps(x, centred, probe, p, s, q, k, probe_v)


def host_attention(
    x: Tensor, weights: MHAWeights, spec: HostSpec, attn_mask: Tensor | None, is_causal: bool,
    rope: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the softmax rows (B, H, N, N), queries and keys (B, H, N, D) of a host with these ``weights`` and ``spec``.

    Arguments as of ``AttentionModule.forward``.
    """
    q = heads_of(x, weights.query, weights.query_bias)
    k = heads_of(x, weights.key, weights.key_bias)
    norms = spec.extras.get("qk_norm", {})
    if norms:
        dtype = next((p.dtype for norm in norms.values() for p in norm.parameters()), q.dtype)
        q, k = norms["q_norm"](q.to(dtype)).to(q.dtype), norms["k_norm"](k.to(dtype)).to(k.dtype)
    if spec.rope is not None:
        q, k = rotate_heads(q, rope, spec.rope), rotate_heads(k, rope, spec.rope)
    return masked_softmax(q * spec.scale @ k.mT, attn_mask, is_causal), q, k


def heads_of(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns the projection of tokens to heads, (B, H, N, D).

    Args:
        x, weight, bias: (B, N, C), (H, C, D) and (H, D) or None.
    """
    y = torch.einsum("bnc,hcd->bhnd", x, weight)
    return y if bias is None else y + bias[:, None]


def joined(x: Tensor) -> Tensor:
    """Reshapes (B, H, N, D) to (B*N, H*D)."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)
