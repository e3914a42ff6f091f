"""Singular values of the modes of a Pairs tensor, and what people mean by its rank."""

from typing import NamedTuple

import torch
from torch import Tensor

from vit_tucker.tensor.tucker import Pairs


class ModeSpectra(NamedTuple):
    """Singular values of the three unfoldings of a tensor, the largest first.

    Attributes:
        head: (H,).
        left: (min(I, H*D),).
        right: (min(J, H*D),).
    """

    head: Tensor
    left: Tensor
    right: Tensor


def mode_spectra(pairs: Pairs) -> ModeSpectra:
    """Returns the singular values of the unfoldings, without squaring them: good to 1e-15 of the largest.

    The left unfolding [A_1 B_1^T, ...] has the singular values of [A_1 R_1^T, ...], B_i = Q_i R_i, which has H*D columns only.

    Args:
        pairs: the tensor (H, I, J), float64.

    Returns:
        One falling spectrum per mode; the squared sums are all the tensor's squared norm.
    """
    return ModeSpectra(_head_values(pairs), _left_values(pairs), _left_values(Pairs(pairs.right, pairs.left)))


def _left_values(pairs: Pairs) -> Tensor:
    small = torch.linalg.qr(pairs.right, mode="r").R  # (H, min(D, J), D)
    return torch.linalg.svdvals((pairs.left @ small.mT).transpose(0, 1).flatten(1))


def _head_values(pairs: Pairs) -> Tensor:
    heads, _, width = pairs.left.shape
    left, right = (_shrink(side, heads * width) for side in pairs)
    slices = (left @ right.mT).flatten(1)  # (H, IJ), or smaller with the same inner products
    return torch.linalg.svdvals(torch.linalg.qr(slices.mT, mode="r").R)


def _shrink(side: Tensor, columns: int) -> Tensor:
    """Returns (H, I, D) in orthonormal coordinates of the span of all columns, where that is smaller."""
    heads, rows, width = side.shape
    if columns >= rows:
        return side
    return torch.linalg.qr(side.transpose(0, 1).flatten(1), mode="r").R.unflatten(1, (heads, width)).transpose(0, 1)


def numerical_rank(values: Tensor, size: int, tolerance: float | None = None) -> int:
    """Counts the singular values above rounding: tolerance * largest, tolerance = size * machine epsilon by default.

    Args:
        values: (n,) singular values, the largest first.
        size: the larger side of the matrix.
        tolerance: relative.
    """
    tolerance = size * torch.finfo(values.dtype).eps if tolerance is None else tolerance
    return int((values > tolerance * values[0]).sum())


def effective_rank(values: Tensor) -> float:
    """Returns exp of the entropy of the singular values as shares of their sum.

    Source: Roy and Vetterli, The effective rank, 2007.

    Args:
        values: (n,) singular values, not all zero.
    """
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp().item()


def stable_rank(values: Tensor) -> float:
    """Returns the squared Frobenius norm over the squared largest singular value.

    Args:
        values: (n,) singular values, the largest first and not zero.
    """
    return (values.square().sum() / values[0].square()).item()


def energy_rank(values: Tensor, energy: float) -> int:
    """Returns the smallest rank that keeps this share of the squared norm.

    Args:
        values: (n,) singular values, the largest first.
        energy: 0 < energy <= 1.
    """
    squares = values.double().square()
    discarded = squares.flip(0).cumsum(0).flip(0)  # energy from index r on: what rank r loses; small terms first
    enough = discarded <= (1 - energy) * discarded[0]
    return int(enough.nonzero()[0]) if enough.any() else len(values)


def mode_ranks(pairs: Pairs, tolerance: float | None = None) -> tuple[int, int, int]:
    """Returns the numerical ranks (head, left, right) of a Pairs tensor.

    Args:
        pairs: the tensor.
        tolerance: singular values up to this share of the largest count as zero; None: larger side of the matrix times machine
            epsilon.
    """
    heads, rows, columns = pairs.left.shape[0], pairs.left.shape[1], pairs.right.shape[1]
    spectra = mode_spectra(pairs)
    head, left, right = (
        numerical_rank(values, max(rows * heads, columns * heads, rows * columns), tolerance) for values in spectra
    )
    return head, left, right
