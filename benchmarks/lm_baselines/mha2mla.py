"""Partial RoPE by contributions of pairs, and one SVD of the other keys with the values: MHA2MLA."""

from typing import Any

import torch
from torch import Tensor, nn

from lm_baselines.care import root_and_inverse
from lm_baselines.moments import LayerMoments, attention_layers, decoder_layers, shape_of
from lm_baselines.partial_rope import PartialRope, PartialRopeAttention


def mha2mla(
    model: nn.Module, moments: list[LayerMoments], entries: int, pairs: int = 4, whiten: bool = False
) -> nn.Module:
    """Converts a model in place by MHA2MLA (arXiv 2502.14837; its code at JT-Ushio/MHA2MLA, 2_norm.py and patch_func.py).

    Of each key head the ``pairs`` pairs with the largest contribution keep RoPE: the mean 2-norm of the key's pair times those
    of the query heads that read it, summed over these (S_2-norm). Queries and keys lose the positions of the other pairs; the
    rows of the key projection that belong to them, with the value projection below, are reduced to one latent by a joint SVD.

    Differences from the authors' code: none in the rule. With ``whiten`` the SVD is of the weights times the root of the
    input's second moment (their get_whiten_matrix.py prepares such factors, after SVD-LLM); the paper's is of the weights alone.

    Args:
        model: dense.
        moments: see ``layer_moments``.
        entries: cached per token and layer: 2 * pairs for each key head, and the latent.
        pairs: of each key head that keep RoPE, up to D/2.
        whiten: weight the SVD by the activations.
    """
    for layer, attention, moment in zip(decoder_layers(model), attention_layers(model), moments, strict=True):
        layer.self_attn = PartialRopeAttention(attention, mha2mla_weights(attention, moment, entries, pairs, whiten))
    return model


def rows_of(pairs: Tensor, width: int) -> Tensor:
    """Returns the rows of a head, real parts and then imaginary parts, that belong to some of its pairs.

    Args:
        pairs: numbers of pairs, (..., P).
        width: D, of the head.
    """
    return torch.cat([pairs, pairs + width // 2], -1)


def joint_svd(weight: Tensor, rank: int, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the projections to a latent (L, C) and from it (K, L): the weight's best approximation of rank L.

    Args:
        weight: (K, C).
        rank: L.
        inputs: second moment (C, C) in whose norm it is the best; None for the identity.
    """
    root, inverse = (None, None) if inputs is None else root_and_inverse(inputs, 0.0)
    u, s, vh = torch.linalg.svd(weight if root is None else weight @ root, full_matrices=False)
    down = vh[:rank] if inverse is None else vh[:rank] @ inverse
    return down, u[:, :rank] * s[:rank]


def mha2mla_weights(attention: Any, moment: LayerMoments, entries: int, pairs: int, whiten: bool) -> PartialRope:
    """Returns the weights of one layer, see ``mha2mla``.

    Args:
        attention: the dense module.
        moment: of its input.
        entries, pairs, whiten: see ``mha2mla``.
    """
    heads, groups, width = shape_of(attention)
    each = heads // groups
    query, key, value = (
        getattr(attention, f"{name}_proj").weight.detach().double().unflatten(0, (-1, width)) for name in "qkv"
    )
    contributions = moment.query_norms.unflatten(0, (groups, each)).sum(1) * moment.key_norms  # (G, D/2)
    order = contributions.sort(dim=-1, descending=True, stable=True).indices
    kept, dropped = (part.sort(-1).values for part in (order[:, :pairs], order[:, pairs:]))

    def rows(weight: Tensor, chosen: Tensor) -> Tensor:
        index = rows_of(chosen, width).repeat_interleave(len(weight) // groups, 0)
        return torch.take_along_dim(weight, index.unsqueeze(-1), 1)

    plain = rows(key, dropped)  # (G, E, C)
    rank = entries - groups * 2 * pairs
    joint = torch.cat([plain.flatten(0, 1), value.flatten(0, 1)])
    down, up = joint_svd(joint, rank, moment.inputs if whiten else None)
    size = plain.shape[0] * plain.shape[1]
    return PartialRope(
        query_rotated=rows(query, kept),
        query_plain=rows(query, dropped),
        key_rotated=rows(key, kept),
        frequencies=kept,
        down=down,
        key_plain=up[:size].view(groups, -1, down.shape[0]) if size else up[:0],
        value=up[size:].view(groups, width, -1),
    )
