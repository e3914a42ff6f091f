"""The attention part of a step of decoding in all forms that ``decoding.py`` compares, and the shapes of its hosts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vit_tucker.attention.decoding import attend_past

Call = Callable[[], Any]
LATENT = 128
"""Of MLA: as many cached numbers per token as Tucker Attention with r3 = 64."""
VOCABULARY = 1000


@dataclass(frozen=True)
class Shape:
    """A host's attention: H heads, G key/value heads, their width D, and the model's width d."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    dim: int

    def model(self, layers: int) -> nn.Module:
        """Builds a random model of this shape with a small vocabulary, whose head costs next to nothing."""
        if self.name == "gpt2":
            gpt2 = transformers.GPT2Config(vocab_size=VOCABULARY, n_layer=layers, n_positions=16384,
                                            bos_token_id=None, eos_token_id=None)  # fmt: skip
            return transformers.GPT2LMHeadModel(gpt2).eval()
        llama = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=self.dim, intermediate_size=4 * self.dim, num_hidden_layers=layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, head_dim=self.head_dim,
            max_position_embeddings=16384, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        )  # fmt: skip
        return transformers.LlamaForCausalLM(llama).eval()


SHAPES = {shape.name: shape for shape in (Shape("gpt2", 12, 12, 64, 768), Shape("llama", 32, 8, 64, 2048))}


def packed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Dense attention with heads that share a key packed, whatever transformers does; q (B, H, 1, D)."""
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)


def products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Dense attention as two products and a softmax."""
    scores = (q * scale).reshape(q.shape[0], k.shape[1], -1, q.shape[3]) @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def attention_calls(shape: Shape, batch: int, cached: int, ranks: list[int], dtype: torch.dtype) -> dict[str, Call]:
    """Calls of the attention part of a step, one token against ``cached`` ones of a static cache; the first is the host's.

    Args:
        shape: of the host.
        batch: texts.
        cached: tokens, the newest among them.
        ranks: r3 of Tucker Attention.
        dtype: of all tensors.
    """
    scale = shape.head_dim**-0.5
    mask = torch.ones(batch, 1, 1, cached, dtype=torch.bool)
    module = SimpleNamespace(num_key_value_groups=shape.heads // shape.kv_heads, is_causal=True)

    def tensors(kv_heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        q = torch.randn(batch, shape.heads, 1, width, dtype=dtype)
        k, v = (torch.randn(batch, kv_heads, cached, width, dtype=dtype) for _ in "kv")
        return q, k, v

    q, k, v = tensors(shape.kv_heads, shape.head_dim)
    calls: dict[str, Call] = {
        "dense, transformers": lambda: sdpa_attention_forward(module, q, k, v, mask, scaling=scale),
        "dense, packed": lambda: packed(q, k, v, mask, scale),
        "dense, products": lambda: products(q, k, v, mask, scale),
    }
    for rank in ranks:
        calls[f"Tucker, r3={rank}"] = partial(
            attend_past, *tensors(1, rank), attn_mask=mask, is_causal=True, scale=scale
        )
    q_latent, latent, _ = tensors(1, LATENT)
    calls[f"MLA absorbed, c={LATENT}"] = partial(
        attend_past, q_latent, latent, latent, attn_mask=mask, is_causal=True, scale=scale
    )
    up = torch.randn(2 * shape.heads * shape.head_dim, LATENT, dtype=dtype)
    all_q = tensors(1, shape.head_dim)[0]

    def expanding() -> Tensor:
        keys, values = F.linear(latent, up).unflatten(-1, (2 * shape.heads, -1)).squeeze(1).transpose(1, 2).chunk(2, 1)
        return F.scaled_dot_product_attention(all_q, keys, values, attn_mask=mask, scale=scale)

    return calls | {f"MLA re-expanding, c={LATENT}": expanding}
