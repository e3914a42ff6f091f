"""Factors of other ranks, on small tensors whose answer is known."""

import torch

from vit_tucker.tensor.resize import grow, keep_pairs, mode_gram, truncate
from vit_tucker.tensor.tucker import Tucker


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def dense(tucker: Tucker) -> torch.Tensor:
    return torch.einsum("abc,ha,ib,jc->hij", tucker.core, tucker.head, tucker.left, tucker.right)


def test_the_gram_of_a_mode_is_that_of_the_unfolded_rest():
    tucker = Tucker(normal(2, 3, 4), normal(5, 2), normal(6, 3), normal(7, 4))
    whole = dense(tucker)
    for mode, factor in enumerate((tucker.head, tucker.left, tucker.right)):
        unfolded = whole.movedim(mode, 0).flatten(1)
        gram = factor @ mode_gram(tucker, mode) @ factor.mT
        torch.testing.assert_close(gram, unfolded @ unfolded.mT, rtol=1e-10, atol=1e-10)  # sums of 42 terms in float64


def test_truncation_keeps_the_leading_singular_vectors():
    factor, rest = normal(9, 5), normal(5, 20)
    kept = truncate(factor, rest @ rest.mT, 2)
    left, values, right = torch.linalg.svd(factor @ rest, full_matrices=False)
    best = left[:, :2] * values[:2] @ right[:2]
    torch.testing.assert_close(kept.factor @ kept.map @ rest, best, rtol=1e-9, atol=1e-9)
    assert (factor[:, :2] @ rest[:2] - best).norm() > 0.1 * best.norm()


def test_the_pairs_with_the_largest_part_stay():
    """Columns of lengths 1 to 3 in turns, so that the pairs have the squares 2 + small, 5, 13 - the last two stay."""
    factor = torch.eye(8, dtype=torch.float64)[:, :6] * torch.tensor([1.0, 1.0, 3.0, 2.0, 2.0, 1.0])
    kept, pairs = keep_pairs(factor, torch.eye(6, dtype=torch.float64), 4)
    assert pairs.tolist() == [1, 2]
    assert torch.equal(kept.factor, factor[:, 2:])
    assert torch.equal(kept.map, torch.eye(6, dtype=torch.float64)[2:])
    _, other = keep_pairs(factor, torch.diag(torch.tensor([99.0, 99.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)), 2)
    assert other.tolist() == [0]  # what follows counts as much


def test_new_columns_are_orthogonal_and_as_long_as_the_others():
    factor = normal(9, 3)
    for rows in (None, 7):
        grown, used = grow(factor, 5, rows), rows or 9
        assert torch.equal(grown.factor[:, :3], factor)
        new = grown.factor[:, 3:]
        assert new.shape == (9, 2)
        assert not new[used:].any()
        assert (factor[:used].mT @ new[:used]).abs().max() < 1e-12  # orthogonalised twice in float64
        length = factor[:used].square().sum(0).mean()
        torch.testing.assert_close(new.mT @ new, length * torch.eye(2, dtype=torch.float64), rtol=1e-10, atol=1e-12)
        assert torch.equal(grown.map, torch.eye(5, 3, dtype=torch.float64))
