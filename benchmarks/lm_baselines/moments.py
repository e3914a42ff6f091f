"""What the baselines know of calibration tokens: moments of each attention layer's input, and norms of its RoPE pairs."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vit_tucker.errors import ConfigError

Batch = Tensor | Mapping[str, Tensor]


class LayerMoments(NamedTuple):
    """Sums over the calibration tokens of one attention layer.

    Attributes:
        inputs: mean of x x^T over tokens, not centred, (C, C) float64; x is what the projections read.
        query_norms: mean 2-norm of each RoPE pair of each query head before the rotation, (H, D/2) float64.
        key_norms: the same of each key head, (G, D/2).
    """

    inputs: Tensor
    query_norms: Tensor
    key_norms: Tensor


def decoder_layers(model: nn.Module) -> Any:
    """Returns the layers of a LLaMA-like model."""
    return getattr(getattr(model, "model", None), "layers", None)


def attention_layers(model: nn.Module) -> list[Any]:
    """Returns the attention modules of a LLaMA-like model, checked.

    Raises:
        ConfigError: the model isn't one, or has biases or norms in its attention, which the baselines don't describe.
    """
    layers = decoder_layers(model)
    if layers is None:
        raise ConfigError(f"{type(model).__name__} is no LLaMA-like model: it has no model.layers")
    found = [layer.self_attn for layer in layers]
    for attention in found:
        projections = [getattr(attention, f"{name}_proj", None) for name in "qkvo"]
        if any(projection is None or projection.bias is not None for projection in projections):
            raise ConfigError(
                f"{type(attention).__name__}: the baselines need q, k, v and o projections without biases"
            )
        if hasattr(attention, "q_norm"):
            raise ConfigError(f"{type(attention).__name__} has norms on queries and keys, which no baseline describes")
    return found


def shape_of(attention: Any) -> tuple[int, int, int]:
    """Returns the numbers of query heads and key heads, and the width of a head: (H, G, D)."""
    width = attention.head_dim
    return attention.q_proj.out_features // width, attention.k_proj.out_features // width, width


def dense_entries(model: nn.Module) -> int:
    """Returns how many entries a dense model caches per token and layer."""
    _, groups, width = shape_of(attention_layers(model)[0])
    return 2 * groups * width


def pair_norms(x: Tensor, width: int) -> Tensor:
    """Returns the summed 2-norm of the RoPE pairs (d, d + D/2) of each head over all tokens, (heads, D/2).

    Args:
        x: outputs of a projection, (B, N, heads * D).
        width: D, of a head.
    """
    pairs = x.detach().flatten(0, 1).unflatten(-1, (-1, 2, width // 2))  # (tokens, heads, 2, D/2)
    return pairs.norm(dim=2).double().sum(0)


@torch.no_grad()
def layer_moments(model: nn.Module, batches: Iterable[Batch]) -> list[LayerMoments]:
    """Returns the moments of each attention layer over all tokens of the batches, which have no padding.

    Args:
        model: in its dense form.
        batches: token ids (B, N), or arguments of the model by name.
    """
    layers = attention_layers(model)
    sums = [[torch.zeros((), dtype=torch.float64) for _ in range(3)] for _ in layers]
    tokens = 0
    with ExitStack() as stack:
        for attention, own in zip(layers, sums, strict=True):
            for place, projection in ((1, attention.q_proj), (2, attention.k_proj)):
                handle = projection.register_forward_hook(partial(add_moments, own, place, attention.head_dim))
                stack.callback(handle.remove)
        for batch in batches:
            given = arguments(batch)
            tokens += given["input_ids"].numel()
            model(**given, use_cache=False)
    if not tokens:
        raise ConfigError("no calibration tokens")
    return [LayerMoments(*(total / tokens for total in own)) for own in sums]


def add_moments(
    sums: list[Tensor], place: int, width: int, module: nn.Module, args: tuple[Tensor], output: Tensor
) -> None:
    """Adds what a projection of queries or keys has just read and returned: a hook, but for its first arguments.

    Args:
        sums: of x x^T, and of norms of pairs of queries and of keys.
        place: 1 for queries, 2 for keys.
        width: D, of a head.
        module, args, output: of the call.
    """
    sums[place] = sums[place] + pair_norms(output, width)
    if place == 1:
        x = args[0].flatten(0, -2)
        sums[0] = sums[0] + (x.mT @ x).double()


def arguments(batch: Batch) -> dict[str, Tensor]:
    """Returns a batch as arguments of the model; refuses padding, which would count as tokens."""
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    mask = given.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise ConfigError("the baselines calibrate on full blocks of tokens: attention_mask has zeros")
    return given
