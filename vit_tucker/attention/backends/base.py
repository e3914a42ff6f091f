"""Defines what a backend of attention is, and the facts of a call by which one is chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vit_tucker.attention.tracing import own_only

LOW_PRECISION = (torch.bfloat16, torch.float16)
FEW_QUERIES = 8
"""Of one text, in decoding: with more, heads that share a key are as fast apart. Measured by ``benchmarks/decoding.py``."""


class Facts(NamedTuple):
    """Facts of a call by which a backend is chosen; none of them changes from batch to batch.

    Attributes:
        device: "cpu", "cuda", ...
        dtype: of queries, keys and values.
        heads, kv_heads: H and G, how many key/value heads they share.
        key_width, value_width: of one head.
        mask: "none", "boolean", "additive" or "causal".
        mask_grad: the mask is trained (position biases).
        dropout: attention weights are dropped, at whatever rate.
        grad: a backward pass may follow.
        own_only: only torch's own operations will do: the call is being exported (ONNX, torch.export, torch.jit.trace) or
            transformed (torch.func).
        ranks: (r2, r3, r2t, r3t) of Tucker Attention, whose kernels may form queries and outputs too; None for queries, keys and
            values as such.
        angles_grad: the angles by which Tucker Attention rotates its queries are trained (mixed RoPE).
        keeps_more: queries and outputs of all of its heads are more numbers per token than dense attention keeps for a backward
            pass, 4 H D, and tokens are many.
        few: queries are few against a past, as in decoding: reading its keys and values is what takes time.
    """

    device: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    mask: str = "none"
    mask_grad: bool = False
    dropout: bool = False
    grad: bool = False
    own_only: bool = False
    ranks: tuple[int, int, int, int] | None = None
    angles_grad: bool = False
    keeps_more: bool = False
    few: bool = False

    def __str__(self) -> str:
        shape = f"{self.heads} heads of width {self.key_width}"
        if self.value_width != self.key_width:
            shape += f" and {self.value_width}"
        if self.kv_heads < self.heads:
            shape += f" on {self.kv_heads} key/value head{'s' if self.kv_heads > 1 else ''}"
        if self.ranks is not None:
            shape = f"{self.heads} heads, Tucker ranks {self.ranks[:2]} and {self.ranks[2:]}"
        extras = ([] if self.mask == "none" else [f"{self.mask} mask"]) + (["dropout"] if self.dropout else [])
        extras += ["few queries with a past"] if self.few else []
        use = "training" if self.grad else "inference"
        return ", ".join([f"{self.device}, {str(self.dtype).removeprefix('torch.')}", shape, *extras, use])


class TuckerCall(NamedTuple):
    """Tucker Attention between its projections: sum_i softmax(scale * P T_i K^T + mask) V S_i^T (arXiv 2603.30033, Eqs 2-6).

    Attributes:
        p, k, v: (B, N, r2), (B, N, r3), (B, N, r3t).
        pre, post: T (H, r2, r3) and S (H, r2t, r3t).
        attn_mask: boolean (True: attend) or additive, broadcasts to (B, H, N, N).
        is_causal: attend to earlier tokens and the token itself; takes precedence over the mask.
        scale: factor on the scores.
        dropout: rate of the attention weights.
        angles: sines and cosines by which the queries rotate, each (N, r3/2) or (B, N, r3/2); the keys are rotated already.
    """

    p: Tensor
    k: Tensor
    v: Tensor
    pre: Tensor
    post: Tensor
    attn_mask: Tensor | None
    is_causal: bool
    scale: float
    dropout: float = 0.0
    angles: tuple[Tensor, Tensor] | None = None


def given_widths(facts: Facts) -> tuple[int, int]:
    """Returns Dk and Dv as they are."""
    return facts.key_width, facts.value_width


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        name: in ``attention.backend``.
        refuses: facts -> why the backend can't take such calls, None if it can.
        attend: (q, k, v, attn_mask, is_causal, scale, dropout) -> y. q (B, H, N, Dk); k (B, G, N, Dk) and v (B, G, N, Dv), G
            divides H, head i uses key/value head i // (H / G); attn_mask boolean (True: attend) or additive, broadcasts to
            (B, H, N, N); y (B, H, N, Dv). None for kernels of Tucker Attention only.
        whole: TuckerCall -> z (B, N, r2t). None for backends that take queries, keys and values only.
        widths: facts -> Dk and Dv, at least as many as they are: what is narrower gets columns of zeros first.
        remark: facts -> how such calls are computed, for the log.
    """

    name: str
    refuses: Callable[[Facts], str | None]
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float, float], Tensor] | None
    whole: Callable[[TuckerCall], Tensor] | None = None
    widths: Callable[[Facts], tuple[int, int]] = given_widths
    remark: Callable[[Facts], str] | None = None


def facts_of(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, dropout: float) -> Facts:
    """Returns the facts of a call; arguments as of ``fused_attention``."""
    mask, mask_grad = mask_facts(attn_mask, is_causal)
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or mask_grad)
    return Facts(device_type(q), q.dtype, q.shape[1], k.shape[1], q.shape[3], v.shape[3],
                 mask, mask_grad, drops(dropout), grad, own_only(), few=few_queries(q, k))  # fmt: skip


def few_queries(q: Tensor, k: Tensor) -> bool:
    """Returns whether queries (B, H, Nq, Dk) are few against keys (B, G, Nk, Dk) with a past: see ``Facts``."""
    if q.shape[2] <= FEW_QUERIES and q.shape[2] < k.shape[2]:  # noqa: SIM103  # of open numbers these are no bools
        return True
    return False


def drops(rate: float) -> bool:
    """Returns whether attention weights are dropped at this rate."""
    if rate:  # noqa: SIM103
        return True
    return False


def mask_facts(attn_mask: Tensor | None, is_causal: bool) -> tuple[str, bool]:
    """Returns the kind of a mask, and whether it is trained.

    Args:
        attn_mask: boolean or additive, broadcasts to (B, H, N, N); None for none.
        is_causal: the mask is ignored.
    """
    if is_causal:
        return "causal", False
    if attn_mask is None:
        return "none", False
    return (
        "boolean" if attn_mask.dtype == torch.bool else "additive",
        attn_mask.requires_grad and torch.is_grad_enabled(),
    )


def device_type(x: Tensor) -> str:
    """Returns ``x.device.type`` of a tensor ``x`` (any shape), which torch is slow to make a string of."""
    return "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type


@functools.cache
def fast_bfloat16() -> bool:
    """Returns whether this CPU multiplies bfloat16 matrices faster than float32 ones."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)
