"""Layers and models that ``decoding.py`` compares: transformers' own, patched, and with MLA that re-expands its cache."""

from __future__ import annotations

from typing import Any

import torch
from decoding_forms import LATENT, VOCABULARY, Call, Shape
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

import vit_tucker as vt
from vit_tucker.hosts.transformers_layers import CACHES, argument_names, take_cache

(CACHE,) = set(CACHES) & set(argument_names(GPT2Attention))
"""What this version of transformers calls the argument with the cache."""


class ExpandingMLA(nn.Module):
    """Multi-head latent attention as transformers' DeepseekV3 computes it: all cached latents are expanded at each step.

    Without its decoupled rotated key, which would only add to it.
    """

    def __init__(self, shape: Shape, layer_idx: int) -> None:
        super().__init__()
        width = shape.heads * shape.head_dim
        self.shape, self.layer_idx = shape, layer_idx
        self.q_a, self.q_b = nn.Linear(shape.dim, LATENT, bias=False), nn.Linear(LATENT, width, bias=False)
        self.kv_a, self.kv_b = nn.Linear(shape.dim, LATENT, bias=False), nn.Linear(LATENT, 2 * width, bias=False)
        self.o_proj = nn.Linear(width, shape.dim)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Returns the output (B, N, d) of tokens (B, N, d), and no maps; arguments as of the host's class."""
        names = ("past_key_values", "cache_position", "attention_mask")
        kwargs |= zip(names, args, strict=False)
        past, mask = take_cache(kwargs), kwargs.get("attention_mask")
        latent = self.kv_a(hidden_states).unsqueeze(1)
        if past is not None:
            latent, _ = past.update(latent, latent[..., :0], self.layer_idx)
        q = self.q_b(self.q_a(hidden_states)).unflatten(-1, (self.shape.heads, -1)).transpose(1, 2)
        keys, values = (
            self.kv_b(latent.squeeze(1)).unflatten(-1, (2 * self.shape.heads, -1)).transpose(1, 2).chunk(2, 1)
        )
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)
        return self.o_proj(y.transpose(1, 2).flatten(2)), None


def models_of(shape: Shape, layers: int, ranks: list[tuple[int, int, int]], dtype: torch.dtype) -> dict[str, nn.Module]:
    """Builds the models that are compared, with random weights; the first is the dense host.

    Args:
        shape: of the host.
        layers: how many.
        ranks: (r1, r2, r3) of Tucker Attention.
        dtype: of all weights.
    """
    models: dict[str, nn.Module] = {"dense, transformers": shape.model(layers)}
    configs: dict[str, vt.AttentionConfig] = {
        f"Tucker, r3={triple[2]}": vt.TuckerConfig(ranks=triple, init="random") for triple in ranks
    }
    configs[f"MLA absorbed, c={LATENT}"] = vt.MLAConfig(q_lora_rank=LATENT, kv_lora_rank=LATENT, init="random")
    for name, config in configs.items():
        models[name] = shape.model(layers)
        vt.patch(models[name], config)
    expanding = shape.model(layers)
    for i, block in enumerate(blocks_of(expanding)):
        name = "attn" if hasattr(block, "attn") else "self_attn"
        setattr(block, name, ExpandingMLA(shape, i).eval())
    models[f"MLA re-expanding, c={LATENT}"] = expanding
    return {name: model.to(dtype) for name, model in models.items()}


def blocks_of(model: Any) -> nn.ModuleList:
    """Returns the blocks of a model."""
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def filled_cache(model: Any, batch: int, cached: int, static: bool) -> Cache:
    """Returns a cache of a model with random keys and values of ``cached`` - 1 tokens: room for one more.

    Args:
        model: of transformers, patched or not.
        batch: texts.
        cached: tokens after the next one.
        static: ``StaticCache``, else ``DynamicCache``.
    """
    cache = StaticCache(model.config, max_cache_len=cached) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(batch, 1, dtype=torch.long), past_key_values=cache)
    for layer in cache.layers:
        if static:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(cached - 1)
        else:
            shapes = ([*x.shape[:2], cached - 1, x.shape[3]] for x in (layer.keys, layer.values))
            layer.keys, layer.values = (torch.randn(s, dtype=layer.keys.dtype) for s in shapes)
    return cache


def step_of(model: Any, batch: int, cached: int, static: bool, forward: Call | None = None) -> tuple[Call, Cache]:
    """Returns a step of decoding one token against ``cached`` ones, repeatable, and its cache.

    Args:
        model: of transformers, patched or not.
        batch: texts.
        cached: tokens, the newest among them.
        static: kind of the cache.
        forward: what is called instead of the model: its compiled forward.
    """
    cache, tokens = filled_cache(model, batch, cached, static), torch.randint(VOCABULARY, (batch, 1))
    positions = torch.full((batch, 1), cached - 1)
    call: Any = forward or model

    def step() -> Any:
        with torch.no_grad():
            output = call(input_ids=tokens, position_ids=positions, past_key_values=cache)
        cache.crop(-1)
        return output.logits

    return step, cache


def first_layer(model: Any) -> Any:
    """Returns a model's first attention layer."""
    block: Any = blocks_of(model)[0]
    return block.attn if hasattr(block, "attn") else block.self_attn


def layer_step_of(model: Any, shape: Shape, batch: int, cached: int) -> Call:
    """Returns a step of a model's first attention layer, projections included, on a static cache.

    Args:
        model: of transformers, patched or not.
        shape: of the host.
        batch: texts.
        cached: tokens, the newest among them.
    """
    cache, layer = filled_cache(model, batch, cached, True), first_layer(model)
    x = torch.randn(batch, 1, shape.dim, dtype=cache.layers[0].keys.dtype)
    given = {CACHE: cache, "attention_mask": torch.ones(batch, 1, 1, cached, dtype=torch.bool)}
    given |= rotations(model, x, cached - 1)

    def step() -> Tensor:
        with torch.no_grad():
            y, _ = layer(x, **given)
        cache.layers[0].crop(-1)
        return y

    return step


def prefill_of(model: Any, shape: Shape, tokens: int) -> Call:
    """Returns a prompt's pass through a model's first attention layer.

    Args:
        model: of transformers, patched or not.
        shape: of the host.
        tokens: of the prompt.
    """
    layer = first_layer(model)
    x = torch.randn(1, tokens, shape.dim, dtype=next(model.parameters()).dtype)
    given: dict[str, Any] = {CACHE: None, "attention_mask": None} | rotations(model, x, 0)

    def call() -> Tensor:
        with torch.no_grad():
            return layer(x, **given)[0]

    return call


def rotations(model: Any, x: Tensor, first: int) -> dict[str, Any]:
    """Returns the argument with cosines and sines of a model with RoPE.

    Args:
        model: of transformers.
        x: (B, N, d) tokens.
        first: position of the first one.
    """
    if not hasattr(model, "model"):
        return {}
    positions = torch.arange(first, first + x.shape[1]).expand(x.shape[0], -1)
    return {"position_embeddings": model.model.rotary_emb(x, positions)}
