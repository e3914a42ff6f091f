"""SVD of the key and value projections in the norm of their inputs, and ranks by layer: CARE."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lm_baselines.moments import LayerMoments, attention_layers
from lm_baselines.partial_rope import linear


def care(
    model: nn.Module, moments: list[LayerMoments], entries: int, damping: float = 0.1, adjusted: bool = True
) -> nn.Module:
    """Converts a model in place by CARE (arXiv 2603.17946; its code at FutureMLS-Lab/CARE, zeroshot/convert.py and lora_qkv.py).

    The projections W of keys and of values, each by itself, are approximated at a rank as R^-1 SVD(R W^T), R the root of the
    input's second moment with ``damping`` times its mean diagonal added. What is cached are both latents, before RoPE, as in the
    authors' one-shot results: each step expands and rotates the keys of all cached tokens, so this can't be absorbed into the
    queries, and spends more operations than the other methods at the same cache. With ``adjusted`` (CARE-E) the ranks of keys
    and those of values are dealt out over the layers by the authors' greedy rule at the same sum; else all are equal (CARE-U).

    Differences from the authors' code: float64; in the rule none.

    Args:
        model: dense.
        moments: see ``layer_moments``.
        entries: cached per token and layer, mean over layers; even: half for keys, half for values.
        damping: 0.1 in the authors' code.
        adjusted: ranks by layer.
    """
    layers = attention_layers(model)
    factors = [[svd_in_norm(getattr(a, f"{name}_proj").weight, m.inputs, damping) for name in "kv"]
               for a, m in zip(layers, moments, strict=True)]  # fmt: skip
    ranks = []
    for place in range(2):
        spectra = [own[place][1] for own in factors]
        ranks.append(adjusted_ranks(spectra, entries // 2) if adjusted else [entries // 2] * len(layers))
    for attention, own, *widths in zip(layers, factors, *ranks, strict=True):
        for name, (down, s, up), rank in zip("kv", own, widths, strict=True):
            setattr(
                attention, f"{name}_proj", two_products(down[:rank] * s[:rank, None], up[:, :rank], attention.q_proj)
            )
        attention.cache_entries = sum(widths)
    return model


def root_and_inverse(inputs: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Returns the symmetric root of a second moment and the root's inverse.

    Args:
        inputs: (C, C).
        damping: share of the mean diagonal that is added first.
    """
    values, vectors = torch.linalg.eigh(inputs)
    values = values.clamp_min(values[-1] * 1e-10) + damping * inputs.diagonal().mean()
    return vectors * values.sqrt() @ vectors.mT, vectors * values.rsqrt() @ vectors.mT


def svd_in_norm(weight: Tensor, inputs: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the SVD of a weight in the norm of its inputs: down (K, C), singular values (K,), up (K, K); exact with all.

    Args:
        weight: (K, C).
        inputs: second moment (C, C).
        damping: see ``root_and_inverse``.
    """
    root, inverse = root_and_inverse(inputs, damping)
    u, s, vh = torch.linalg.svd(weight.detach().double() @ root, full_matrices=False)
    return vh @ inverse, s, u


def adjusted_ranks(spectra: Sequence[Tensor], rank: int) -> list[int]:
    """Returns one rank per layer, ``rank`` on average: the authors' greedy rule, from half of it and up to twice of it.

    A layer's next rank counts the share that it takes off the rest of its energy, times the root of the number of layers from it
    on (over its mean), over the root of its rank (over the smallest one).

    Args:
        spectra: singular values of each layer, the largest first.
        rank: mean.
    """
    count, least, most = len(spectra), max(1, rank // 2), min(2 * rank, len(spectra[0]))
    energies = torch.stack([s.square() for s in spectra])
    rest = energies.flip(-1).cumsum(-1).flip(-1)  # energy from each place on
    reach = torch.arange(count, 0, -1, dtype=torch.float64) / ((count + 1) / 2)
    cost = torch.arange(energies.shape[1]).clamp_min(1) / least
    gains = energies / rest.clamp_min(1e-12 * rest[:, :1]) * reach.sqrt()[:, None] / cost.sqrt()
    ranks = [least] * count
    for _ in range(count * (rank - least)):
        scores = [gains[i, r].item() if r < most else -1.0 for i, r in enumerate(ranks)]
        ranks[scores.index(max(scores))] += 1
    return ranks


def two_products(down: Tensor, up: Tensor, like: Any) -> nn.Sequential:
    """Returns a projection through a latent.

    Args:
        down: (L, C).
        up: (K, L).
        like: a layer that decides type and device.
    """
    return nn.Sequential(linear(down, like), linear(up, like))
