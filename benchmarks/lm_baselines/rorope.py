"""RoRoPE, FreqFold and balanced joint PCA: TransMLA."""

from typing import Any

import torch
from torch import Tensor, nn

from lm_baselines.moments import LayerMoments, attention_layers, decoder_layers, shape_of
from lm_baselines.partial_rope import PartialRope, PartialRopeAttention


def rorope(
    model: nn.Module, moments: list[LayerMoments], entries: int, rope_heads: int = 1, collapse: int = 1, fold: int = 1
) -> nn.Module:
    """Converts a model in place by TransMLA (arXiv 2502.07864 version 5; its code at fxmeng/TransMLA, commit 0cdde00).

    The keys' real and imaginary parts of each RoPE frequency are turned by one real rotation across the G key heads, the
    principal axes of both parts' second moments (RoRoPE). Where ``fold`` neighbouring frequencies count as equal (FreqFold), the
    rotation is across G * fold coordinates. The leading components of each group keep RoPE, ``rope_heads * fold / collapse`` of
    them, at every ``collapse``-th frequency; one such key serves all heads. The rest of the keys loses its positions; divided by
    the ratio of its mean norm to the values' (balanced), it is reduced with the values to one latent by PCA of the outputs.

    Differences from the authors' code: moments come from the input's moments rather than stored outputs, which is the same PCA;
    the values' norm is a mean over all columns, where theirs leaves out the first few by mistake; query ranks and norms of the
    latent are left out, as in their training-free results. Their code has ``rope_heads`` = 1 throughout; more of them, up to G,
    are tried here, since that can only help it.

    Args:
        model: dense.
        moments: see ``layer_moments``.
        entries: cached per token and layer: the rotated pairs and the latent.
        rope_heads, collapse, fold: integers; fold is a multiple of collapse and divides D/2.
    """
    for layer, attention, moment in zip(decoder_layers(model), attention_layers(model), moments, strict=True):
        weights = rorope_weights(attention, moment, entries, rope_heads, collapse, fold)
        layer.self_attn = PartialRopeAttention(attention, weights)
    return model


def rotations(key: Tensor, inputs: Tensor, width: int, fold: int) -> Tensor:
    """Returns RoRoPE's rotation of each group of frequencies, (D/2/fold, G * fold, G * fold), the largest component first.

    Args:
        key: weight of the key projection, (G * D, C) float64.
        inputs: second moment of its input, (C, C).
        width: D.
        fold: frequencies of a group.
    """
    heads, half = key.shape[0] // width, width // 2
    rows = torch.arange(heads * width, device=key.device).view(heads, 2, half // fold, fold)
    rows = rows.permute(2, 1, 0, 3).flatten(2)  # (groups, parts, G * fold)
    moment = (key @ inputs @ key.mT)[rows.unsqueeze(-1), rows.unsqueeze(-2)].sum(1)  # of both parts
    return torch.linalg.eigh(moment).eigenvectors.flip(-1)


def rorope_weights(
    attention: Any, moment: LayerMoments, entries: int, rope_heads: int, collapse: int, fold: int
) -> PartialRope:
    """Returns the weights of one layer, see ``rorope``.

    Args:
        attention: the dense module.
        moment: of its input.
        entries, rope_heads, collapse, fold: see ``rorope``.
    """
    heads, groups, width = shape_of(attention)
    half = width // 2
    query, key, value = (getattr(attention, f"{name}_proj").weight.detach().double() for name in "qkv")
    turn = rotations(key, moment.inputs, width, fold)  # (J, (g, i), c)
    turn = turn.unflatten(1, (groups, fold))  # (J, g, i, c)
    parts = key.view(groups, 2, half // fold, fold, -1)  # (g, s, J, i, C)
    turned = torch.einsum("jgic,gsjix->jcsx", turn, parts)  # keys' components, (J, c, s, C)
    asked = query.view(groups, heads // groups, 2, half // fold, fold, -1)  # (g, h, s, J, i, C)
    asked = torch.einsum("jgic,ghsjix->ghjcsx", turn, asked).flatten(0, 1)
    kept = rope_heads * fold // collapse
    component = torch.arange(kept)
    frequencies = torch.arange(0, half, fold).unsqueeze(1) + component % (fold // collapse) * collapse  # (J, kept)
    back = torch.zeros(groups, 2, half // fold, fold, half // fold, groups * fold, 2, dtype=key.dtype)
    for part in range(2):
        for group in range(half // fold):
            back[:, part, group, :, group, :, part] = turn[group]
    back = back.flatten(0, 3).unflatten(0, (groups, width))[..., kept:, :].flatten(2)  # (g, D, plain components)
    plain = turned[:, kept:].flatten(0, 2)  # (plain components, C)
    rank = entries - rope_heads * width // collapse
    down, key_plain, values = balanced_pca(plain, value, moment.inputs, rank)
    return PartialRope(
        query_rotated=asked[:, :, :kept].flatten(1, 2).transpose(1, 2).flatten(1, 2),
        query_plain=query.view(heads, width, -1)[: heads if len(plain) else 0],
        key_rotated=turned[:, :kept].flatten(0, 1).transpose(0, 1).flatten(0, 1).unsqueeze(0),
        frequencies=frequencies.view(1, -1),
        down=down,
        key_plain=back @ key_plain if len(plain) else back.new_zeros(0, rank),
        value=values.view(groups, width, rank),
    )


def balanced_pca(plain: Tensor, value: Tensor, inputs: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the projection to a joint latent (L, C), and from it to the plain keys (K, L) and to the values (V, L).

    Args:
        plain: weight of keys without a position, (K, C).
        value: weight of the values, (V, C).
        inputs: second moment (C, C) of the input.
        rank: L.
    """
    norms = [((weight @ inputs) * weight).sum(1).clamp_min(0).sqrt() for weight in (plain, value)]
    ratio = (norms[0].mean() / norms[1].mean()).item() if len(plain) else 1.0
    joint = torch.cat([plain / ratio, value])
    basis = torch.linalg.eigh(joint @ inputs @ joint.mT).eigenvectors.flip(-1)[:, :rank]
    return basis.mT @ joint, basis[: len(plain)] * ratio, basis[len(plain) :]
