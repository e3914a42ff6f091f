"""What a converted model's cache holds, and whether steps with it are right for a padded batch."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lm_baselines.moments import decoder_layers


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Returns the model's argument for a cache: ``cache`` from transformers 5.24 on, ``past_key_values`` before.

    Args:
        model: of transformers.
        cache: of one of its classes.
    """
    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True}


@torch.no_grad()
def counted_entries(model: nn.Module) -> float:
    """Returns the entries per token and layer in the tensors of a cache after two tokens."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    model(input_ids=torch.tensor([[0, 1]]), **with_cache(model, cache))
    return sum(part.numel() for layer in cache.layers for part in (layer.keys, layer.values)) / 2 / len(cache.layers)


def cached_entries(model: nn.Module) -> float:
    """Returns the entries cached per token and layer: those that the layers state, else as counted in a cache's tensors."""
    layers = decoder_layers(model)
    stated = [layer.self_attn.cache_entries for layer in layers if hasattr(layer.self_attn, "cache_entries")]
    return sum(stated) / len(layers) if len(stated) == len(layers) else counted_entries(model)


class PaddingErrors(NamedTuple):
    """Largest differences of logits between a sequence alone and the same in a left-padded batch, over the largest logit.

    Attributes:
        prefill: of all its tokens at once.
        step: of the next token, decoded with the cache.
    """

    prefill: float
    step: float


@torch.no_grad()
def padding_errors(model: nn.Module, tokens: Tensor, padding: int) -> PaddingErrors:
    """Returns what left padding does to a sequence; 0 but for rounding where positions are read from ``position_ids``.

    The batch is the sequence behind so many padding tokens, and a row of the whole length beside it; mask and positions are those
    that ``generate`` makes.

    Args:
        model: causal language model.
        tokens: (N,) of the sequence; the last one is decoded in a step.
        padding: tokens before it.
    """
    alone = last_logits(model, tokens.unsqueeze(0), 0)
    padded = torch.cat([tokens.new_zeros(padding), tokens])
    beside = last_logits(model, torch.stack([padded, tokens.new_ones(len(padded))]), padding)
    return PaddingErrors(
        *(((b[0] - a[0]).abs().max() / a.abs().max()).item() for a, b in zip(alone, beside, strict=True))
    )


def last_logits(model: nn.Module, batch: Tensor, padding: int) -> list[Tensor]:
    """Returns the logits (B, vocabulary) at the last token but one by a prefill, and at the last one by a step.

    Args:
        model: causal language model.
        batch: (B, N) tokens.
        padding: tokens of the first row that are none.
    """
    from transformers import DynamicCache

    mask = torch.ones_like(batch)
    mask[0, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    given, found = with_cache(model, DynamicCache()), []
    for part, end in ((slice(0, -1), -1), (slice(-1, None), None)):
        output = model(
            input_ids=batch[:, part], attention_mask=mask[:, :end], position_ids=positions[:, part], **given
        )  # fmt: skip
        found.append(output.logits[:, -1])
    return found
