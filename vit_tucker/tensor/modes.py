"""Mode products and unfoldings of order-3 tensors.

A tensor of shape (I_1, I_2, I_3) has modes 0, 1, 2 here; the paper counts from 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Matrix whose columns are the mode-``mode`` fibres.

    Args:
        tensor: (I_1, ..., I_n).
        mode: 0-based mode, 0 <= mode < n.

    Returns:
        (I_mode, product of the other I), the other modes in their order, the last one running fastest.

    Source: Kolda and Bader, Tensor Decompositions and Applications, section 2.4 (here in row-major order).
    """
    return tensor.movedim(mode, 0).flatten(1)


def mode_dot(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """n-mode product ``tensor x_mode matrix``.

    Args:
        tensor: (I_1, ..., I_n).
        matrix: (J, I_mode).
        mode: 0-based mode.

    Returns:
        (I_1, ..., J, ..., I_n), J in place of I_mode.

    Raises:
        ValueError: the widths of ``matrix`` and of the mode differ.
    """
    if matrix.shape[1] != tensor.shape[mode]:
        raise ValueError(f"mode {mode} has size {tensor.shape[mode]}, the matrix has {matrix.shape[1]} columns")
    return torch.tensordot(matrix, tensor, dims=([1], [mode])).movedim(0, mode)


def tucker_to_tensor(core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """The full tensor ``core x_1 U_1 x_2 U_2 ...`` of a Tucker decomposition.

    Args:
        core: (R_1, ..., R_n).
        factors: U_m of shape (I_m, R_m), one for each mode.

    Returns:
        (I_1, ..., I_n).
    """
    for mode, factor in enumerate(factors):
        core = mode_dot(core, factor, mode)
    return core
