"""Divides a latent between keys, which rotate, and values, which don't."""

import torch
from torch import Tensor

from vit_tucker.tensor.metric import Root
from vit_tucker.tensor.rotary import Lifted, pair_energies
from vit_tucker.tensor.tucker import Pairs


def leave_room(
    lifted: Lifted, values: Tensor, width: int, spare_rotations: Tensor, metric: Root | None = None, trials: int = 9
) -> Lifted:
    """Returns a latent of given width for both keys, which rotate, and values, which don't.

    The leading pairs serve the keys, the rest of the width the values; the summed relative errors of both decide how many. The
    result is the keys' tensor with ``width`` coordinates; its right factors are zero where pairs serve the values alone.

    Args:
        lifted: the keys' tensor (H, I, S), with its basis (J, S) in the coordinates of the values.
        values: columns of what the values must span, (C, V), C <= J.
        width: of the latent, even.
        spare_rotations: rotations for pairs that serve no key yet, (width/2,).
        metric: root of the metric (C, C) of their error; None for the identity.
        trials: how many divisions are tried; keys get one pair at least.
    """
    pairs, rows = width // 2, values.shape[0]
    energy = pair_energies(lifted)
    basis = lifted.basis[:rows] if metric is None else metric.root @ lifted.basis[:rows]
    values = values if metric is None else metric.root @ values
    most = min(pairs, len(energy))
    best, error = None, float("inf")
    for count in torch.linspace(1, most, trials).round().int().unique().tolist():
        span = torch.linalg.qr(basis[:, : 2 * count]).Q
        rest = values - span @ (span.mT @ values)
        u, s, _ = torch.linalg.svd(rest, full_matrices=False)
        spare = width - 2 * count
        lost = s[spare:].square().sum() / values.square().sum() + energy[count:].sum() / energy.sum()
        if lost < error:
            best, error = (count, u[:, :spare]), lost.item()
    assert best is not None
    count, extra = best
    extra = extra if metric is None else metric.inverse @ extra
    padding = lifted.basis.new_zeros(lifted.basis.shape[0], width - 2 * count)
    padding[:rows, : extra.shape[1]] = extra
    right = torch.zeros_like(lifted.pairs.right[:, :1]).repeat(1, width, 1)
    right[:, : 2 * count] = lifted.pairs.right[:, : 2 * count]
    rotations = torch.cat([lifted.rotations[:count], spare_rotations[count:].to(lifted.rotations)])
    return Lifted(Pairs(lifted.pairs.left, right), torch.cat([lifted.basis[:, : 2 * count], padding], 1), rotations)
