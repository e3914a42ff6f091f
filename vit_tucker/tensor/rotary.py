"""Stacks of matrix products whose inner coordinates are rotated in pairs: the pre-softmax tensor of heads with RoPE.

Head i scores tokens x and y as sum_k Re(conj(x^T a_ik) (y^T b_ik) exp(i angle_k)), with complex columns a_ik = A_i[:, 2k] +
i A_i[:, 2k+1], b_ik likewise, and an angle per pair of tokens that belongs to the rotation of pair k. Averaged over all angles,
the squared norm is half of the sum, over heads and rotations, of |sum_k conj(a_ik) b_ik^T|^2. For each rotation the b_ik of all
heads span a small complex space. In orthonormal bases of these spaces, side by side, the tensor is an ordinary one (H, I, S)
with twice that squared norm, whose right mode may be truncated but not rotated: ``lift``. A latent key for all heads (latent
RoPE) is such a truncation, and exact with all S coordinates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vit_tucker.tensor.tucker import Pairs, Tucker, hosvd, relative_distance


class RotaryPairs(NamedTuple):
    """The tensor stack_i A_i R B_i^T, R the rotations.

    Attributes:
        left: A, (H, I, K), pairs of columns side by side.
        right: B, (H, J, K).
        rotations: number of each pair's rotation, (H, K/2), int64; equal numbers have equal angles.
    """

    left: Tensor
    right: Tensor
    rotations: Tensor


class Lifted(NamedTuple):
    """A RotaryPairs tensor in orthonormal coordinates of its rotations' spaces, the most energetic pair first.

    Attributes:
        pairs: ordinary tensor (H, I, S).
        basis: right coordinates (J, S), pairs of columns side by side: B_i = basis @ pairs.right_i where the a_ik don't vanish.
        rotations: number of each pair's rotation, (S/2,).
    """

    pairs: Pairs
    basis: Tensor
    rotations: Tensor


def as_complex(x: Tensor) -> Tensor:
    """Returns pairs of coordinates as complex numbers (..., K/2).

    Args:
        x: (..., K) real, K even.
    """
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


def as_real(z: Tensor) -> Tensor:
    """Returns complex numbers as pairs of coordinates (..., K).

    Args:
        z: (..., K/2) complex.
    """
    return torch.view_as_real(z).flatten(-2)


def coefficient_blocks(gamma: Tensor) -> Tensor:
    """Returns the real matrices (..., S, K) of complex coefficients (..., S/2, K/2), to multiply rows of pairs on the right.

    A key k = sum_j gamma_j kappa_j meets the query q as the latent keys kappa_j meet conj(gamma_j) q.

    Args:
        gamma: (..., S/2, K/2) complex.
    """
    rows = torch.stack([torch.stack([gamma.real, gamma.imag], -1), torch.stack([-gamma.imag, gamma.real], -1)], -3)
    return rows.flatten(-2).flatten(-3, -2)  # (..., S/2, 2, K/2, 2) -> (..., S, K)


def pair_shares(tensor: RotaryPairs) -> Tensor:
    """Returns the share of each pair in its head's squared norm, (H, K/2).

    Args:
        tensor: H heads with K coordinates, K even.
    """
    left, right = (side.square().unflatten(-1, (-1, 2)).sum((1, 3)) for side in (tensor.left, tensor.right))
    return left * right / (left * right).sum(-1, keepdim=True).clamp_min(torch.finfo(left.dtype).tiny)


def lift(tensor: RotaryPairs) -> Lifted:
    """Lifts the tensor to an ordinary one, see the module. S = 2 min(J, M) for each rotation, M pairs with it.

    Args:
        tensor: float64. Rotations with fewer pairs than others count as many, the rest of them zero.
    """
    left, right, numbers = tensor
    energy = left.square().unflatten(-1, (-1, 2)).sum((1, 3))  # |a_ik|^2, (H, K/2)
    rotations, counts = numbers.flatten().unique(return_counts=True)
    members = numbers.flatten().argsort(stable=True).split(counts.tolist())  # (i, k) of each rotation as i * K/2 + k
    none = numbers.numel()  # a pair of zeros
    index = torch.nn.utils.rnn.pad_sequence(list(members), batch_first=True, padding_value=none)  # (F, M)
    vectors = as_complex(right).transpose(0, 1).flatten(1) * energy.flatten().sqrt()  # (J, H*K/2)
    weighted = torch.nn.functional.pad(vectors, (0, 1))[:, index].movedim(1, 0)  # (F, J, M)
    basis, values, _ = torch.linalg.svd(weighted, full_matrices=False)  # (F, J, L), (F, L)
    best = values.flatten().argsort(descending=True, stable=True)
    width = values.shape[1]
    chosen = basis.transpose(0, 1).flatten(1)[:, best]  # (J, S/2)
    latent_rotations = rotations.repeat_interleave(width)[best]
    gamma = chosen.mH @ as_complex(right)  # (H, S/2, K/2)
    gamma = gamma * (latent_rotations[:, None] == numbers[:, None, :])
    return Lifted(Pairs(left, coefficient_blocks(gamma)), as_real(chosen), latent_rotations)


def pair_energies(lifted: Lifted) -> Tensor:
    """Returns the squared norm (S/2,) of each pair of coordinates of the right mode, the largest first.

    Args:
        lifted: the lifted tensor, its right mode of S coordinates sorted by energy.
    """
    return (lifted.pairs.left @ lifted.pairs.right.mT).square().sum((0, 1)).unflatten(0, (-1, 2)).sum(1)


def rotary_distance(tensor: RotaryPairs, other: RotaryPairs) -> Tensor:
    """Returns ||tensor - other|| / ||tensor|| averaged over all angles, as precise as ``relative_distance``; widths K may differ.

    Args:
        tensor, other: reference and approximation with the same (H, I, J).
    """
    sides = as_complex(tensor.right), as_complex(other.right)
    parts: list[list[Tensor]] = [[], []]
    for rotation in torch.cat([tensor.rotations.flatten(), other.rotations.flatten()]).unique():
        masks = [(side.rotations == rotation) for side in (tensor, other)]
        members = [z.transpose(1, 2)[mask] for z, mask in zip(sides, masks, strict=True)]  # (M, J)
        span = torch.linalg.qr(torch.cat(members).mT).Q  # (J, L)
        for part, z, mask in zip(parts, sides, masks, strict=True):
            part.append(span.mH @ (z * mask.unsqueeze(1)))  # (H, L, K/2)
    lifted = [coefficient_blocks(torch.cat(part, 1)) for part in parts]
    return relative_distance(Pairs(tensor.left, lifted[0]), Pairs(other.left, lifted[1]))


def tensor_distance(tensor: Pairs | RotaryPairs, other: Pairs | RotaryPairs) -> Tensor:
    """Returns the relative distance of two tensors, both with rotations or both without.

    Args:
        tensor, other: of the same shape, both with rotations or both without.
    """
    if isinstance(tensor, RotaryPairs) and isinstance(other, RotaryPairs):
        return rotary_distance(tensor, other)
    return relative_distance(Pairs(tensor.left, tensor.right), Pairs(other.left, other.right))


def ordinary(tensor: Pairs | RotaryPairs) -> Pairs:
    """Returns an ordinary tensor with the norm of the given one: itself, or lifted.

    Args:
        tensor: with or without rotations.
    """
    if not isinstance(tensor, RotaryPairs):
        return tensor
    return unlifted_norm(lift(tensor))


def unlifted_norm(lifted: Lifted) -> Pairs:
    """Returns the ordinary tensor of a lifted one, with the norm of what was lifted: lifted ones have twice the squared norm.

    Args:
        lifted: see the module.
    """
    return Pairs(lifted.pairs.left * 0.5**0.5, lifted.pairs.right)


def best_pair_each(tensor: RotaryPairs) -> tuple[Tensor, Tensor]:
    """Returns one key for all heads with as many pairs as each of them: pair k of every head as a multiple of one pair k.

    Complex multiples pass through any rotation, so the heads may even rotate the pair by angles of their own.

    Args:
        tensor: float64; its rotations don't matter.

    Returns:
        basis (J, K), pairs side by side, and change (H, K, K): query i @ change_i meets the new key as query i met key i.
    """
    energy = tensor.left.square().unflatten(-1, (-1, 2)).sum((1, 3))  # (H, K/2)
    vectors = as_complex(tensor.right).permute(2, 1, 0)  # b, (K/2, J, H)
    basis = torch.linalg.svd(vectors * energy.mT.sqrt().unsqueeze(1), full_matrices=False).U[..., 0].mT  # (J, K/2)
    gamma = (basis.mH @ as_complex(tensor.right)).diagonal(dim1=-2, dim2=-1)  # u_k^* b_ik, (H, K/2)
    return as_real(basis), coefficient_blocks(torch.diag_embed(gamma)).mT


def whiten_rotary(
    tensor: RotaryPairs, left: Tensor | None = None, right: Tensor | None = None, weights: Tensor | None = None
) -> RotaryPairs:
    """Returns the tensor in the norm of metrics, given by their roots (I, I) and (J, J), and of weights of the heads (H,).

    Args:
        tensor: the tensor in the ordinary norm.
        left, right: (I, I) and (J, J) roots of the metrics of both modes; None for the identity.
        weights: (H,) weights of the heads; None for equal ones.
    """
    a, b, rotations = tensor
    if weights is not None:
        a = a * weights[:, None, None]
    return RotaryPairs(a if left is None else left @ a, b if right is None else right @ b, rotations)


def rotary_tucker(lifted: Lifted, ranks: tuple[int, int, int]) -> Tucker:
    """Truncates the higher-order SVD of a lifted tensor in all modes; raises ValueError for an odd or impossible R3.

    Its right factor (J, R3) has pairs that rotate by ``lifted.rotations[: R3 / 2]``. Exact at full rank.

    Args:
        lifted: the tensor (H, I, S).
        ranks: (R1, R2, R3), R3 even.
    """
    size, rank = lifted.basis.shape[1], ranks[2]
    if rank % 2 or not 2 <= rank <= size:
        raise ValueError(f"rank {rank} of the right mode is not an even number up to {size}")
    eye = torch.eye(size, rank, dtype=lifted.basis.dtype, device=lifted.basis.device)
    return hosvd(lifted.pairs, ranks, right=eye)._replace(right=lifted.basis[:, :rank])
