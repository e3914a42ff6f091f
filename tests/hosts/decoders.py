"""Tiny decoders of transformers with random weights, in float64 unless said otherwise, and configs that compress them."""

from typing import Any

import pytest
import torch

import vit_tucker as vt
from tests.reference import randomise

transformers = pytest.importorskip("transformers")

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 1,
    "attn_implementation": "sdpa",
}
GPT2 = {
    "vocab_size": 61,
    "n_embd": 24,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 256,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 1,
    "attn_implementation": "sdpa",
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "llama": ("Llama", LLAMA),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 8}),
    "qwen2": ("Qwen2", LLAMA),  # biases of queries, keys and values
    "qwen3": ("Qwen3", LLAMA),  # norms of heads' queries and keys
    "granite": ("Granite", LLAMA | {"attention_multiplier": 0.5}),  # a softmax scale of its own
    "smollm3": ("SmolLM3", LLAMA | {"no_rope_layers": [1, 0]}),  # a layer that does not rotate
    "starcoder2": ("Starcoder2", LLAMA | {"residual_dropout": 0.1}),
}
LATENT = ("gpt2", "llama", "mistral", "qwen2")
"""Those whose heads may share a latent."""


def make_decoder(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A tiny model of a family, in eval mode, all weights random: no equality is one of zeros."""
    family, values = DECODERS[name]
    config = getattr(transformers, f"{family}Config")(**values | options)
    model = randomise(transformers.AutoModelForCausalLM.from_config(config))
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            torch.nn.init.ones_(module.weight)
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


def small(name: str, width: int = 8) -> Any:
    """Tucker Attention with a latent key narrower than the host's keys."""
    return vt.TuckerConfig(ranks=(4, 16, width), post_ranks=(4, 16, 6))


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token numbers, none of them padding."""
    return torch.randint(2, 61, shape, generator=torch.Generator().manual_seed(seed))


def patched(name: str, config: Any = None, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A tiny model with Tucker Attention."""
    model = make_decoder(name, dtype, **options)
    vt.patch(model, small(name) if config is None else config)
    return model


def attention_of(model: Any) -> Any:
    """The first attention module of a model."""
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    return getattr(layers[0], "attn", None) or layers[0].self_attn
