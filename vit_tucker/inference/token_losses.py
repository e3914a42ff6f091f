"""Log-likelihoods of tokens by a causal language model, with the logits of a few tokens in memory at a time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vit_tucker.errors import ConfigError, reason_of

CHUNK = 1 << 24
"""Logits that are in memory at once, in float32: 64 MB, whatever the vocabulary is."""
Logits = Callable[[Tensor], Tensor]


def scorer(model: nn.Module, sample: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Returns a function of ids (B, N) and a number of known tokens that sums the negative log-likelihoods of those after them.

    Args:
        model: in evaluation mode.
        sample: ids (1, N), on which it is tried whether logits are what the model's head makes of its last hidden state.

    Raises:
        ConfigError: the model returns no logits for its tokens.
    """
    try:
        whole = logits_of(model(sample, **without_cache(model)))
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, AssertionError) as error:
        raise ConfigError(f"{type(model).__name__} is no causal language model: {reason_of(error)}") from None
    if whole.ndim != 3 or whole.shape[:2] != sample.shape:
        raise ConfigError(
            f"{type(model).__name__} is no causal language model: its output is {tuple(whole.shape)}, not (B, N, V)"
        )
    hidden, head = parts_of(model)
    separate = hidden is not None and torch.equal(head(hidden(sample)), whole)

    def score(ids: Tensor, known: int) -> Tensor:
        targets = ids[:, known:]
        if separate:
            assert hidden is not None
            states, logits = hidden(ids)[:, known - 1 : -1], head
        else:
            states, logits = logits_of(model(ids, **without_cache(model)))[:, known - 1 : -1], nn.Identity()
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        step = max(1, CHUNK // whole.shape[-1])
        rows = zip(states.flatten(0, 1).split(step), targets.flatten().split(step), strict=True)
        for state, target in rows:
            losses = functional.cross_entropy(logits(state).float(), target, reduction="none")
            total += losses.sum(dtype=torch.float32 if losses.device.type == "mps" else torch.float64).cpu()
        return total

    return score


def parts_of(model: nn.Module) -> tuple[Logits | None, Logits]:
    """Returns a transformers model's functions from ids to its last hidden states (None without), and from these to logits."""
    base, find_head = getattr(model, "base_model", None), getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    if base is None or base is model or not isinstance(head, nn.Module):
        return None, nn.Identity()

    def hidden(ids: Tensor) -> Tensor:
        found: Tensor = base(ids, **without_cache(model))[0]
        return found

    return hidden, head


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Returns the argument by which a transformers model keeps no cache; of other modules nothing is known."""
    return {"use_cache": False} if hasattr(model, "config") and hasattr(model, "generation_config") else {}


def logits_of(output: Any) -> Tensor:
    """Returns the logits of a model's output: ``output.logits``, or the output itself."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits
