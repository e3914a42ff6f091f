"""The one place that computes softmax(Q K^T) V for all methods, for any number of key/value heads, by one of the backends."""

import torch
from torch import Tensor, nn

from vit_tucker.attention.backends import AUTO, choose, get_backend, heads
from vit_tucker.attention.backends.base import facts_of
from vit_tucker.attention.backends.eager import attention_weights
from vit_tucker.attention.backends.padding import attend_padded
from vit_tucker.errors import PatchError


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    attn_drop: nn.Dropout,
    fused: bool,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    backend: str = AUTO,
) -> Tensor:
    """Computes softmax(scale * Q K^T + mask) V.

    Args:
        q: (B, H, N, Dk).
        k: (B, G, N, Dk), G divides H; head i uses key/value head i // (H / G).
        v: (B, G, N, Dv).
        scale: factor on the scores.
        attn_drop: dropout of the attention weights; called as a module on the maps in the unfused path, so that hooks see them.
        fused: False: plain matrix products whatever the backend, with the maps (B, H, N, N) in memory. timm's name.
        attn_mask: boolean (True: attend) or additive, broadcasts to (B, H, N, N).
        is_causal: attend to earlier tokens and the token itself; takes precedence over the mask.
        backend: name of a backend, or "auto".

    Returns:
        (B, H, N, Dv).

    Raises:
        PatchError: the backend asked for can't take the call.
    """
    if fused and backend != "eager":
        dropout = attn_drop.p if attn_drop.training else 0.0
        return fused_attention(q, k, v, attn_mask, is_causal, scale, dropout, backend)
    if isinstance(q, Tensor):  # and not an fx proxy
        choose(facts_of(q, k, v, attn_mask, is_causal, attn_drop.p if attn_drop.training else 0.0), "eager")
    attn = attn_drop(attention_weights(q, k, attn_mask, is_causal, scale))
    return heads.shared_matmul(attn, v)


@torch.fx.wrap
def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout: float,
    backend: str,
) -> Tensor:
    """Computes ``attend`` by a backend; a leaf in fx graphs, since the choice depends on tensors.

    Args:
        q: (B, H, N, Dk) queries.
        k, v: (B, G, N, Dk) keys and (B, G, N, Dv) values, G divides H.
        attn_mask: boolean (True: attend) or added to the scores, broadcasts to (B, H, N, N); None for none.
        is_causal: attend to earlier tokens and the token itself; the mask is ignored then.
        scale: factor on the scores.
        dropout: rate of the attention weights, 0 in evaluation.
        backend: name of a backend, or "auto".

    Returns:
        (B, H, N, Dv).

    Raises:
        PatchError: the backend can't take such calls.
    """
    facts = facts_of(q, k, v, attn_mask, is_causal, dropout)
    chosen = get_backend(choose(facts, backend).name)
    if chosen.attend is None:
        raise PatchError(f"attention backend '{chosen.name}' accepts no queries, keys and values")
    return attend_padded(chosen, facts, q, k, v, attn_mask, is_causal, scale, dropout)


def attend_flops(num_heads: int, num_tokens: int, key_dim: int, value_dim: int) -> int:
    """Returns the operations of the two matrix products of attention for one image: 2 H N^2 (Dk + Dv).

    Args:
        num_heads: H.
        num_tokens: N.
        key_dim, value_dim: Dk and Dv, widths of a head's keys and values.
    """
    return 2 * num_heads * num_tokens**2 * (key_dim + value_dim)
