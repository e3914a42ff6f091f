"""Tucker decomposition (HOSVD) of a stack of matrix products, without ever forming the tensor.

Attention weights come as pairs: head i has the matrix A_i B_i^T, with A_i (I, D) and B_i (J, D). The stacked tensor (H, I, J)
has 7 million entries for ViT-B/16; the pairs and three Gram matrices have all that its HOSVD needs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

Ranks = tuple[int, int, int]
"""R1, R2, R3 of the modes (head, left, right)."""


class Pairs(NamedTuple):
    """The tensor stack_i A_i B_i^T, kept as its factors.

    Attributes:
        left: A, (H, I, D).
        right: B, (H, J, D).
    """

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """Returns the tensor itself, (H, I, J). For tests and small layers."""
        return self.left @ self.right.mT


class Tucker(NamedTuple):
    """A Tucker decomposition of an order-3 tensor.

    Attributes:
        core: (R1, R2, R3).
        head: U1, (H, R1).
        left: U2, (I, R2).
        right: U3, (J, R3).
    """

    core: Tensor
    head: Tensor
    left: Tensor
    right: Tensor


def gram_left(pairs: Pairs) -> Tensor:
    """Returns the Gram of the left mode, sum_i A_i (B_i^T B_i) A_i^T. Shape (I, I); symmetric, positive semidefinite.

    Args:
        pairs: the tensor.
    """
    weighted = pairs.left @ (pairs.right.mT @ pairs.right)  # (H, I, D)
    flat = pairs.left.transpose(0, 1).flatten(1)  # (I, H*D)
    return weighted.transpose(0, 1).flatten(1) @ flat.mT


def gram_right(pairs: Pairs) -> Tensor:
    """Returns the Gram of the right mode, sum_i B_i (A_i^T A_i) B_i^T. Shape (J, J).

    Args:
        pairs: the tensor.
    """
    return gram_left(Pairs(pairs.right, pairs.left))


def gram_head(pairs: Pairs) -> Tensor:
    """Returns the Gram of the head mode, G[i, j] = <A_i B_i^T, A_j B_j^T>. Shape (H, H).

    Args:
        pairs: the tensor.
    """
    left = torch.einsum("iad,jae->ijde", pairs.left, pairs.left)
    right = torch.einsum("iad,jae->ijde", pairs.right, pairs.right)
    return (left * right).sum((-2, -1))


def leading_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """Returns the leading eigenvectors of a symmetric matrix: the leading left singular vectors of the unfolding.

    Args:
        gram: (I, I), symmetric.
        rank: 1 <= rank <= I.

    Returns:
        (I, rank), orthonormal columns by falling eigenvalue; the largest entry of each column is positive, so that the
        same weights give the same factors on every machine.

    Raises:
        ValueError: rank outside 1..I.
    """
    if not 1 <= rank <= gram.shape[0]:
        raise ValueError(f"rank {rank} is outside 1..{gram.shape[0]}")
    return _fix_signs(torch.linalg.eigh(gram).eigenvectors.flip(-1)[:, :rank])


def _fix_signs(vectors: Tensor) -> Tensor:
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).contiguous()


def left_basis(pairs: Pairs, rank: int) -> Tensor:
    """Returns the ``rank`` leading left singular vectors (I, rank) of the left mode's unfolding.

    A Gram squares the singular values, so that directions below 1e-8 of the largest drown in rounding. Where the columns of all
    A_i together are fewer than the rows, the search is therefore held to their span by a QR: with a rank that covers the span
    nothing at all is lost, which full-rank conversions need (the query mode has one row more than the heads have columns).

    Args:
        pairs: the tensor, (H, I, J) as pairs of width D.
        rank: 1 <= rank <= I.
    """
    heads, rows, width = pairs.left.shape
    if heads * width >= rows:
        return leading_eigenvectors(gram_left(pairs), rank)
    flat = pairs.left.transpose(0, 1).flatten(1)  # (I, H*D)
    q, r = torch.linalg.qr(flat, mode="complete" if rank > heads * width else "reduced")
    span, rest = q[:, : heads * width], q[:, heads * width : rank]
    inner = Pairs(r[: heads * width].unflatten(1, (heads, width)).transpose(0, 1), pairs.right)  # (H, H*D, D)
    return _fix_signs(torch.cat([span @ leading_eigenvectors(gram_left(inner), min(rank, heads * width)), rest], 1))


def project(pairs: Pairs, head: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Returns the core of the tensor in given bases, ``tensor x_1 U1^T x_2 U2^T x_3 U3^T``, from the projected pairs.

    Args:
        pairs: the tensor, (H, I, J) as pairs of width D.
        head: U1, (H, R1).
        left: U2, (I, R2).
        right: U3, (J, R3).

    Returns:
        (R1, R2, R3). With orthonormal bases this is the best core for them.
    """
    slices = (left.mT @ pairs.left) @ (right.mT @ pairs.right).mT  # (H, R2, R3)
    return torch.tensordot(head, slices, dims=([0], [0]))


def hosvd(pairs: Pairs, ranks: Ranks, right: Tensor | None = None) -> Tucker:
    """Computes the truncated higher-order SVD of a Pairs tensor.

    Args:
        pairs: the tensor (H, I, J), float64 for exactness: the Grams square the condition number.
        ranks: (R1, R2, R3) for the modes (head, left, right), each at most the mode's size.
        right: an orthonormal basis (J, R3) to use for the right mode instead of its own (a basis shared by two tensors).

    Returns:
        Tucker with orthonormal factors. Squared error at most the sum over the modes of the discarded squared singular
        values, hence at most 3 times that of the best approximation with these ranks; zero at full rank.

    Source: De Lathauwer et al., A Multilinear SVD, 2000; Tucker Attention (arXiv 2603.30033), App. C.1.4.
    """
    head = leading_eigenvectors(gram_head(pairs), ranks[0])
    left = left_basis(pairs, ranks[1])
    if right is None:
        right = left_basis(Pairs(pairs.right, pairs.left), ranks[2])
    return Tucker(project(pairs, head, left, right), head, left, right)


def hooi(pairs: Pairs, ranks: Ranks, steps: int = 10) -> Tucker:
    """Improves the HOSVD by higher-order orthogonal iteration: each basis anew for the other two, in turns.

    Args:
        pairs: the tensor (H, I, J), float64.
        ranks: (R1, R2, R3).
        steps: turns over the three modes.

    Returns:
        Tucker with orthonormal factors; its error is at most the HOSVD's, and a fixed point is stationary.

    Source: De Lathauwer et al., On the best rank-1 and rank-(R1, ..., RN) approximation, 2000.
    """
    core, head, left, right = hosvd(pairs, ranks)
    for _ in range(steps):
        small = (left.mT @ pairs.left) @ (right.mT @ pairs.right).mT  # (H, R2, R3)
        head = leading_eigenvectors(small.flatten(1) @ small.flatten(1).mT, ranks[0])
        left = _mode_basis(pairs.left, right.mT @ pairs.right, head, ranks[1])
        right = _mode_basis(pairs.right, left.mT @ pairs.left, head, ranks[2])
        core = project(pairs, head, left, right)
    return Tucker(core, head, left, right)


def _mode_basis(own: Tensor, other: Tensor, head: Tensor, rank: int) -> Tensor:
    """Returns the leading left singular vectors of the mode of ``own`` (H, I, D), ``other`` (H, R3, D) and heads projected."""
    unfolded = torch.einsum("ha,hid,hrd->iar", head, own, other).flatten(1)  # (I, R1*R3)
    if not rank <= unfolded.shape[1] < unfolded.shape[0]:
        return leading_eigenvectors(unfolded @ unfolded.mT, rank)
    q, r = torch.linalg.qr(unfolded)  # the search is held to the span of the few columns: small eigenvalue problems
    return _fix_signs(q @ leading_eigenvectors(r @ r.mT, rank))


def joint_right_basis(pre: Pairs, post: Pairs, rank: int) -> Tensor:
    """Returns one orthonormal basis (C, rank) for keys and values, each tensor weighted by its norm.

    Args:
        pre, post: the tensors of queries and keys, and of values and outputs.
        rank: columns of the basis, 1 to C.
    """
    weighted = gram_right(pre) / squared_norm(pre) + gram_right(post) / squared_norm(post)
    return leading_eigenvectors(weighted, rank)


def tucker_pairs(tucker: Tucker) -> Pairs:
    """Returns the tensor of a Tucker decomposition as pairs of width R2.

    Args:
        tucker: the decomposition.
    """
    slices = torch.tensordot(tucker.head, tucker.core, 1)
    return Pairs(tucker.left.expand(len(slices), -1, -1), tucker.right @ slices.mT)


def apply_pairs(pairs: Pairs, vectors: Tensor) -> Tensor:
    """Returns sum_i A_i B_i^T x_i for one vector per head, (I,).

    Args:
        pairs: the tensor.
        vectors: (H, J).
    """
    return torch.einsum("hid,hd->i", pairs.left, torch.einsum("hjd,hj->hd", pairs.right, vectors))


def squared_norm(pairs: Pairs) -> Tensor:
    """Returns the squared Frobenius norm of the tensor, from D x D products. Scalar.

    Args:
        pairs: the tensor.
    """
    return ((pairs.left.mT @ pairs.left) * (pairs.right.mT @ pairs.right)).sum()


def relative_distance(pairs: Pairs, other: Pairs) -> Tensor:
    """Returns ||tensor - other||_F / ||tensor||_F for two Pairs tensors (H, I, J), whose widths may differ; 0/0 counts as 0.

    Each head's difference is [A, -A'] [B, B']^T; QR of both sides leaves a small matrix with the same norm, so that nothing
    cancels: the result is good to about 1e-14 where subtracting squared norms would stop at 1e-8.

    Args:
        pairs: reference, widths D.
        other: approximation, widths D'.
    """
    width, rows = pairs.left.shape[-1] + other.left.shape[-1], min(pairs.left.shape[1], pairs.right.shape[1])
    left = torch.cat([pairs.left, -other.left], -1)  # (H, I, D + D')
    right = torch.cat([pairs.right, other.right], -1)
    if width < rows:
        left, right = torch.linalg.qr(left, mode="r").R, torch.linalg.qr(right, mode="r").R
    difference = torch.linalg.vector_norm(left @ right.mT)
    norm = squared_norm(pairs).sqrt()
    return torch.where(norm > 0, difference / norm, difference)
