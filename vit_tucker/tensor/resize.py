"""Other ranks for a factor of a product or of a Tucker tensor: truncation as by a HOSVD of their product, exact growth.

A factor U (I, r) meets the rest of its tensor through r coordinates. Both changes give a new factor (I, R) and a map (R, r) that
the rest takes in along its mode of width r, such as the core of a Tucker tensor: ``core x_k map``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vit_tucker.tensor.tucker import Tucker, leading_eigenvectors


class Resized(NamedTuple):
    """A factor of another rank.

    Attributes:
        factor: (I, R).
        map: (R, r), for the mode of width r of what the factor multiplies; None for the identity.
    """

    factor: Tensor
    map: Tensor | None


def mode_gram(tucker: Tucker, mode: int) -> Tensor:
    """Returns the Gram (r, r) of what multiplies a mode's factor: the core with the other factors in it.

    Args:
        tucker: float64; factors need not be orthonormal.
        mode: 0 head, 1 left, 2 right.
    """
    rest = tucker.core
    for other, factor in enumerate((tucker.head, tucker.left, tucker.right)):
        if other != mode:
            triangle = torch.linalg.qr(factor, mode="r").R
            rest = torch.tensordot(triangle, rest, dims=([1], [other])).movedim(0, other)
    flat = rest.movedim(mode, 0).flatten(1)
    return flat @ flat.mT


def truncate(factor: Tensor, gram: Tensor, rank: int) -> Resized:
    """Truncates a factor to the leading left singular vectors of its mode's unfolding, as a HOSVD of the whole tensor does.

    Args:
        factor: (I, r), float64.
        gram: (r, r), see ``mode_gram``; of a matrix product, right factor times its transpose.
        rank: R, at most min(I, r).
    """
    q, triangle = torch.linalg.qr(factor)
    basis = leading_eigenvectors(triangle @ gram @ triangle.mT, rank)
    return Resized(q @ basis, basis.mT @ triangle)


def keep_pairs(factor: Tensor, gram: Tensor, rank: int) -> tuple[Resized, Tensor]:
    """Keeps the pairs of adjacent columns whose part of the tensor is largest: rotations (RoPE) forbid to mix pairs.

    Args:
        factor: (I, r), float64, r even.
        gram: (r, r), see ``truncate``.
        rank: R, even, at most r.

    Returns:
        The columns and their selection; the numbers of the pairs, rising, (R/2,).
    """
    products = (factor.mT @ factor) * gram
    energy = products.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).sum((1, 3)).diagonal()  # (r/2,)
    pairs = energy.topk(rank // 2).indices.sort().values
    columns = (2 * pairs.unsqueeze(1) + torch.arange(2, device=pairs.device)).flatten()
    return Resized(factor[:, columns], torch.eye(factor.shape[1]).to(factor)[columns]), pairs


def grow(factor: Tensor, rank: int, rows: int | None = None) -> Resized:
    """Adds columns that what follows does not use yet: orthogonal to the others and as long as these are in the mean.

    Args:
        factor: (I, r), float64.
        rank: R, above r.
        rows: of the factor that the new columns may use; the others (biases) stay zero. All if None.
    """
    rows, width = factor.shape[0] if rows is None else rows, factor.shape[1]
    drawn = torch.randn(rows, rank - width, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    new = drawn.to(factor) / rows**0.5
    if rank <= rows:  # else there are no such directions left
        span = torch.linalg.qr(factor[:rows]).Q
        for _ in range(2):  # once more for rounding
            new = new - span @ (span.mT @ new)
        new = torch.linalg.qr(new).Q
    new = new * factor[:rows].square().sum(0).mean().sqrt()
    added = torch.cat([new, new.new_zeros(factor.shape[0] - rows, rank - width)])
    return Resized(torch.cat([factor, added], 1), torch.eye(rank, width).to(factor))


def resize_factor(factor: Tensor, gram: Tensor, rank: int, rows: int) -> Resized:
    """Truncates or grows a factor; one that has the rank already stays itself.

    Args:
        factor: (I, r), float64.
        gram: (r, r), see ``truncate``.
        rank: R.
        rows: see ``grow``.
    """
    if rank == factor.shape[1]:
        return Resized(factor, None)
    return truncate(factor, gram, rank) if rank < factor.shape[1] else grow(factor, rank, rows)


def apply_map(core: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Returns ``core x_mode matrix``: (..., r, ...) -> (..., R, ...).

    Args:
        core: (..., r, ...) with r entries along the mode.
        matrix: (R, r).
        mode: the dimension of ``core``, from 0.
    """
    return torch.tensordot(matrix, core, dims=([1], [mode])).movedim(0, mode)


def orthonormal(factor: Tensor, pairs: bool = False) -> Resized:
    """Returns a factor with orthonormal columns that spans the same, and the map by which the rest of its tensor makes up for it.

    Args:
        factor: (I, r), float64; one of more columns than rows stays itself, with the map None.
        pairs: pairs of adjacent columns rotate (RoPE) and must not be mixed: each only gets unit length, by one number.
    """
    if not pairs:
        return Resized(factor, None) if factor.shape[1] > factor.shape[0] else Resized(*torch.linalg.qr(factor))
    lengths = factor.unflatten(1, (-1, 2)).square().sum((0, 2)).div(2).sqrt()  # (r/2,)
    lengths = torch.where(lengths > 0, lengths, 1.0).repeat_interleave(2)
    return Resized(factor / lengths, lengths.diag())


def orthonormal_tucker(tucker: Tucker, right: Resized) -> Tucker:
    """Returns an equal Tucker tensor whose head and left factors have orthonormal columns.

    Args:
        tucker: float64.
        right: what becomes of its right factor.
    """
    head, left = orthonormal(tucker.head), orthonormal(tucker.left)
    core = tucker.core
    for mode, part in enumerate((head, left, right)):
        core = core if part.map is None else apply_map(core, part.map, mode)
    return Tucker(core, head.factor, left.factor, right.factor)
