"""Finds latent pairs that stand for several rotations: those which the tokens that meet can't tell apart.

Slow rotations hardly turn within a sequence, neighbouring ones stay together, and so pairs with different rotations may share a
latent pair, at the price of an angle that is slightly wrong. What that costs is measured on the tokens that meet: the pair k
under rotation f, with its column times the best complex factor, loses a share of its squared norm. Pairs that hardly rotate at
all are ordinary real columns, of which any two may share a latent pair.

Which rotations to fold is a trade: the more, the more of the heads' keys a latent of given width holds. Some divisions are tried,
no folding among them, and the one that loses least is taken; so nothing is folded where the latent is wide enough.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vit_tucker.tensor.rotary import Lifted, RotaryPairs, as_complex, as_real, lift, pair_energies
from vit_tucker.tensor.tucker import Pairs, left_basis

TOLERANCES = (0.0, 0.003, 0.01, 0.03, 0.1)
"""Shares of a pair's squared norm that folding may lose, one for each division that is tried."""
FOLDED = 10.0
"""What a loss by folding counts against one by truncation: a wrong angle costs up to that much beyond first order, measured on
layers of a language model at a quarter of the cache."""


class Folds(NamedTuple):
    """The costs of rotating pairs by other angles than their own.

    Attributes:
        factors: best factor of the column of a pair with rotation k that rotates by f, (F, F + 1) complex; the last column is of
            no rotation.
        lost: share of the pair's squared norm that is lost with it, (F, F + 1), zero for f = k.
    """

    factors: Tensor
    lost: Tensor


class Division(NamedTuple):
    """A rotation for each rotation, which stands for it.

    Attributes:
        chosen: for each rotation the one that stands for it, (F,); F, no rotation at all, for those that are taken as still.
        factors: those that go with them, (F,) complex.
        lost: share of the squared norm of pairs with this rotation that is lost, (F,).
    """

    chosen: Tensor
    factors: Tensor
    lost: Tensor


def divide(folds: Folds, energies: Tensor, tolerance: float, turning: bool) -> Division:
    """Divides rotations into those that are still, and groups that the strongest of them stands for.

    Args:
        folds: of F rotations.
        energies: squared norm of the pairs with each rotation, (F,).
        tolerance: share of its squared norm that a pair may lose.
        turning: also fold rotations which are not still.
    """
    count = len(energies)
    chosen, lost = torch.arange(count), folds.lost
    open_ = torch.ones(count, dtype=torch.bool)
    still = lost[:, count] <= tolerance
    if tolerance > 0:
        chosen[still] = count
        open_ &= ~still.cpu()
    for strongest in energies.argsort(descending=True, stable=True).tolist() if turning else []:
        if open_[strongest]:
            group = open_ & (lost[:, strongest] <= tolerance).cpu()
            chosen[group] = strongest
            open_ &= ~group
    rows = torch.arange(count)
    factors = torch.where(chosen == rows, 1.0, folds.factors.cpu()[rows, chosen])
    return Division(chosen, factors, lost.cpu()[rows, chosen] * (chosen != rows))


def fold(tensor: RotaryPairs, division: Division, slowest: int) -> Lifted:
    """Lifts a tensor with folded rotations: see ``rotary.lift``, to which this is equal where nothing is folded.

    Args:
        tensor: all heads with the same rotations 0 to F - 1, one for each pair.
        division: of these rotations.
        slowest: rotation of the latent pairs of still columns.
    """
    left, right, numbers = tensor
    still = division.chosen == len(division.chosen)
    scaled = as_real(as_complex(right) * division.factors.to(right.device)[numbers[0]])
    parts: list[Lifted] = []
    turning = (~still[numbers[0].cpu()]).nonzero().flatten().to(left.device)
    if len(turning):
        chosen = division.chosen.to(numbers)[numbers[:, turning]]
        part = lift(RotaryPairs(_columns(left, turning), _columns(scaled, turning), chosen))
        parts.append(part._replace(pairs=Pairs(left, _spread(part.pairs.right, turning, right))))
    resting = still[numbers[0].cpu()].nonzero().flatten().to(left.device)
    if len(resting):
        parts.append(_lift_still(left, scaled, resting, slowest))
    if len(parts) == 1:
        return parts[0]
    order = torch.cat([pair_energies(part) for part in parts]).argsort(descending=True, stable=True)
    columns = torch.stack([2 * order, 2 * order + 1], -1).flatten()
    joint = torch.cat([part.pairs.right for part in parts], 1)[:, columns]
    basis = torch.cat([part.basis for part in parts], 1)[:, columns]
    return Lifted(Pairs(left, joint), basis, torch.cat([part.rotations for part in parts])[order])


def best_fold(tensor: RotaryPairs, folds: Folds, width: int) -> Lifted:
    """Returns the lifted tensor whose leading ``width`` coordinates lose least, folding included.

    Args:
        tensor: all heads with the same rotations.
        folds: of these rotations.
        width: of the latent, even.
    """
    numbers = tensor.rotations[0]
    per_pair = (
        tensor.left.square().unflatten(-1, (-1, 2)).sum((1, 3)) * as_complex(tensor.right).abs().square().sum(1)
    ).sum(0)
    energies = torch.zeros(len(folds.lost), dtype=per_pair.dtype, device=per_pair.device).index_add(
        0, numbers, per_pair
    )
    slowest = int(folds.lost[:, -1].argmin())
    best, least, seen = None, float("inf"), set()
    for tolerance in TOLERANCES:
        for turning in (False, True):
            division = divide(folds, energies, tolerance, turning and tolerance > 0)
            key = tuple(division.chosen.tolist())
            if key in seen:
                continue
            seen.add(key)
            lifted = fold(tensor, division, slowest)
            if best is not None and lifted.basis.shape[1] < width:
                continue
            lost = pair_energies(lifted)[width // 2 :].sum() + FOLDED * (energies * division.lost.to(energies)).sum()
            if lost < least * (1 - 1e-9):
                best, least = lifted, lost.item()
            if least <= 1e-12 * energies.sum():
                break
    assert best is not None
    return best


def _columns(x: Tensor, pairs: Tensor) -> Tensor:
    """Returns the columns of these pairs of x (..., K)."""
    return x.unflatten(-1, (-1, 2))[..., pairs, :].flatten(-2)


def _spread(x: Tensor, pairs: Tensor, like: Tensor) -> Tensor:
    """Returns x (H, S, K') at the columns of these pairs among all of ``like`` (H, J, K), zero elsewhere."""
    whole = x.new_zeros(*x.shape[:2], like.shape[-1] // 2, 2)
    whole[:, :, pairs] = x.unflatten(-1, (-1, 2))
    return whole.flatten(-2)


def _lift_still(left: Tensor, right: Tensor, pairs: Tensor, slowest: int) -> Lifted:
    """Lifts pairs that hardly rotate, as ordinary columns: an orthonormal basis of the most energetic ones, two to a latent pair.

    Lifted tensors have twice the squared norm of what rotates; so have these, by a factor on the right and its inverse on the
    basis.
    """
    own, other = _columns(right, pairs), _columns(left, pairs)
    heads, rows, width = own.shape
    size = min(rows, heads * width) // 2 * 2
    basis = left_basis(Pairs(own, other), size)
    whole = _spread(basis.mT @ own, pairs, right) * 2**0.5
    rotations = torch.full((size // 2,), slowest, dtype=torch.int64, device=left.device)
    return Lifted(Pairs(left, whole), basis / 2**0.5, rotations)
