"""Exact Tucker forms of stacks of matrix products: the bases are the matrices themselves, the core picks their columns."""

import torch
from torch import Tensor

from vit_tucker.tensor.tucker import Tucker


def selector_form(left: Tensor, right: Tensor, groups: int, keep_columns: bool = False) -> Tucker:
    """Writes stack_i A_i B_g(i)^T, head i in group g(i), as Tucker: the bases have all columns, the core selects.

    Where the columns outnumber the rows the basis is the identity, and the core holds the matrices themselves.

    Args:
        left: A, (H, I, D).
        right: B, (G, J, D), one for each group of H / G heads.
        groups: G.
        keep_columns: the right basis holds the columns of B in any case, head by head: rotations go by columns.

    Returns:
        Tucker with head rank H, left rank min(I, H*D), right rank min(J, G*D), or G*D.
    """
    left_basis, left_columns = basis_and_columns(left)
    right_basis, right_columns = all_columns(right) if keep_columns else basis_and_columns(right)
    right_columns = right_columns.repeat_interleave(left.shape[0] // groups, 0)
    eye = torch.eye(left.shape[0], dtype=left.dtype, device=left.device)
    return Tucker(left_columns @ right_columns.mT, eye, left_basis, right_basis)


def basis_and_columns(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a basis U (I, R), R = min(I, K*D), and columns (K, R, D): matrices_k (K, I, D) = U columns_k."""
    count, rows, width = matrices.shape
    if count * width >= rows:
        return torch.eye(rows, dtype=matrices.dtype, device=matrices.device), matrices
    return all_columns(matrices)


def all_columns(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the basis of all columns (I, K*D), and selectors (K, K*D, D) of each matrix's own. Takes (K, I, D)."""
    count, _, width = matrices.shape
    selector = torch.eye(count * width, dtype=matrices.dtype, device=matrices.device)
    return matrices.transpose(0, 1).flatten(1), selector.unflatten(1, (count, width)).transpose(0, 1)
