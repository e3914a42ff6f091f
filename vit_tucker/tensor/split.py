"""Each head's matrix as a product of two narrow ones: exactly where its rank allows, else the best there is."""

from typing import NamedTuple

import torch

from vit_tucker.tensor.mode_ranks import numerical_rank
from vit_tucker.tensor.tucker import Pairs


class Split(NamedTuple):
    """Matrices A_i B_i^T cut to a width.

    Attributes:
        pairs: of that width, balanced: both factors carry the roots of the singular values.
        ranks: numerical rank of each head's matrix before.
        error: ||what was cut off||_F / ||tensor||_F.
    """

    pairs: Pairs
    ranks: list[int]
    error: float


def split_width(tensor: Pairs, width: int, tolerance: float) -> Split:
    """Returns the best approximation of each head's matrix with a given width: its truncated SVD (Eckart and Young).

    The matrices are never formed: QRs of both sides leave a small one with the same singular values.

    Args:
        tensor: pairs of any width, (H, I, W) and (H, J, W), float64.
        width: R of the result.
        tolerance: singular values below this share of the head's largest count as zero in ``ranks``.

    Returns:
        Pairs (H, I, R) and (H, J, R), padded with columns of zeros where the matrices are narrower.
    """
    q_left, r_left = torch.linalg.qr(tensor.left)
    q_right, r_right = torch.linalg.qr(tensor.right)
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    roots = s[:, :width].sqrt().unsqueeze(1)
    pad = (0, width - roots.shape[-1])
    left, right = q_left @ u[..., :width] * roots, q_right @ vh[:, :width].mT * roots
    pairs = Pairs(torch.nn.functional.pad(left, pad), torch.nn.functional.pad(right, pad))
    norm = torch.linalg.vector_norm(s).item()
    error = torch.linalg.vector_norm(s[:, width:]).item() / norm if norm > 0 else 0.0
    ranks = [numerical_rank(values, len(values), tolerance) if values[0] > 0 else 0 for values in s]
    return Split(pairs, ranks, error)
