"""Plain matrix products, with the attention maps (B, H, N, N) in memory: for whoever wants to see them, and for any case."""

from torch import Tensor
from torch.nn import functional as F

from vit_tucker.attention.backends import heads
from vit_tucker.attention.backends.base import Backend, Facts
from vit_tucker.attention.backends.masks import masked_softmax, open_softmax, zero_rows
from vit_tucker.attention.backends.registry import register_backend


def refuses(facts: Facts) -> str | None:
    """Returns None: plain matrix products support every call."""
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, dropout: float
) -> Tensor:
    """Returns softmax(Q K^T) V by plain products of all heads at once; arguments as of ``fused_attention``."""
    attn, blind = open_softmax(scores_of(q, k, scale), attn_mask, is_causal)
    return zero_rows(heads.shared_matmul(F.dropout(attn, dropout), v), blind)  # outputs are smaller than maps


def attention_weights(q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """Returns softmax(scale * Q K^T + mask), (B, H, N, N), also of fx proxies; arguments as of ``fused_attention``."""
    return masked_softmax(scores_of(q, k, scale), attn_mask, is_causal)


def scores_of(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Returns scale * Q K^T, (B, H, N, N); arguments as of ``fused_attention``."""
    return heads.shared_matmul(q * scale, k.transpose(-2, -1))


register_backend(Backend("eager", refuses, attend))
