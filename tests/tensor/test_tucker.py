"""HOSVD of pairs against the textbook HOSVD of the formed tensor."""

import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tucker as tensorly_tucker
from tensorly.tenalg import svd_interface

from vit_tucker.tensor.tucker import (
    Pairs,
    gram_head,
    gram_left,
    gram_right,
    hooi,
    hosvd,
    leading_eigenvectors,
    project,
    relative_distance,
    squared_norm,
)

tensorly.set_backend("pytorch")


def random_pairs(heads: int = 4, rows: int = 9, columns: int = 7, width: int = 3, seed: int = 0) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(heads, rows, width, generator=generator, dtype=torch.float64)
    return Pairs(left, torch.randn(heads, columns, width, generator=generator, dtype=torch.float64))


def rebuilt(tucker) -> torch.Tensor:
    return torch.einsum("abc,ha,ib,jc->hij", *tucker)


def test_grams_are_those_of_the_unfoldings():
    pairs = random_pairs()
    for mode, gram in enumerate((gram_head(pairs), gram_left(pairs), gram_right(pairs))):
        unfolding = tensorly.unfold(pairs.dense(), mode)
        torch.testing.assert_close(gram, unfolding @ unfolding.mT, rtol=1e-12, atol=1e-12)  # float64 sums of 63 terms


def test_full_rank_is_exact_and_one_rank_less_is_not():
    pairs = random_pairs()
    full = (4, 9, 7)
    assert relative_distance(pairs, as_pairs(hosvd(pairs, full))) < 1e-13
    for mode in range(3):
        less = list(full)
        less[mode] -= 1
        assert relative_distance(pairs, as_pairs(hosvd(pairs, tuple(less)))) > 1e-3
    assert relative_distance(pairs, as_pairs(hosvd(pairs, (1, 1, 1)))) > 0.3


def as_pairs(tucker) -> Pairs:
    slices = torch.tensordot(tucker.head, tucker.core, 1)  # (H, R2, R3)
    return Pairs(tucker.left @ slices, tucker.right.expand(len(slices), -1, -1))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.data())
def test_hosvd_keeps_the_textbook_error_bound(heads, rows, columns, width, data):
    pairs = random_pairs(heads, rows, columns, width, seed=heads * 1000 + rows)
    ranks = tuple(data.draw(st.integers(1, size)) for size in (heads, rows, columns))
    tucker = hosvd(pairs, ranks)
    error = torch.linalg.vector_norm(pairs.dense() - rebuilt(tucker)) ** 2
    discarded = sum(
        torch.linalg.svdvals(tensorly.unfold(pairs.dense(), mode))[rank:].square().sum()
        for mode, rank in enumerate(ranks)
    )
    assert error <= discarded + 1e-10 * squared_norm(pairs)
    for factor in (tucker.head, tucker.left, tucker.right):
        identity = torch.eye(factor.shape[1], dtype=torch.float64)
        torch.testing.assert_close(factor.mT @ factor, identity, rtol=0, atol=1e-12)


def test_hosvd_spans_the_leading_singular_vectors():
    pairs = random_pairs(width=5, rows=12, columns=11)
    tucker = hosvd(pairs, (3, 4, 5))
    for mode, factor in enumerate((tucker.head, tucker.left, tucker.right)):
        vectors = torch.linalg.svd(tensorly.unfold(pairs.dense(), mode)).U[:, : factor.shape[1]]
        torch.testing.assert_close(factor @ factor.mT, vectors @ vectors.mT, rtol=0, atol=1e-9)  # Grams square the gaps


def test_full_rank_is_exact_for_badly_conditioned_factors():
    """Singular values over 12 decades, one row more than columns: a Gram alone would drop a true direction."""
    pairs = random_pairs(heads=4, rows=17, columns=16, width=4)
    scales = torch.logspace(0, -12, 16, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(17, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).Q
    flat = (basis * scales) @ torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    pairs = Pairs(flat.unflatten(1, (4, 4)).transpose(0, 1).contiguous(), pairs.right)
    assert relative_distance(pairs, as_pairs(hosvd(pairs, (4, 16, 16)))) < 1e-14
    gram_only = leading_eigenvectors(gram_left(pairs), 16)
    projected = Pairs(gram_only @ (gram_only.mT @ pairs.left), pairs.right)
    assert relative_distance(pairs, projected) > 1e-14


def test_core_is_the_projection():
    pairs = random_pairs()
    head, left, right = (torch.randn(n, 2, dtype=torch.float64) for n in (4, 9, 7))
    expected = torch.einsum("hij,ha,ib,jc->abc", pairs.dense(), head, left, right)
    torch.testing.assert_close(project(pairs, head, left, right), expected)


def test_given_right_basis_is_used():
    pairs = random_pairs()
    basis = leading_eigenvectors(torch.diag(torch.arange(7.0, dtype=torch.float64)), 2)
    assert hosvd(pairs, (4, 9, 2), right=basis).right is basis


def test_relative_distance_resolves_tiny_errors():
    pairs = random_pairs(rows=40, columns=40)
    nearly = Pairs(pairs.left * (1 + 1e-12), pairs.right)
    assert relative_distance(pairs, nearly).item() == pytest.approx(1e-12, rel=0.05)
    dense = torch.linalg.vector_norm(pairs.dense() - random_pairs(rows=40, columns=40, seed=1).dense())
    expected = dense / torch.linalg.vector_norm(pairs.dense())
    torch.testing.assert_close(relative_distance(pairs, random_pairs(rows=40, columns=40, seed=1)), expected)


def test_eigenvectors_have_a_fixed_sign_and_range():
    vectors = leading_eigenvectors(torch.tensor([[2.0, -1.0], [-1.0, 2.0]]), 2)
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()
    with pytest.raises(ValueError, match=r"rank 3 is outside 1\.\.2"):
        leading_eigenvectors(torch.eye(2), 3)


RANKS = [(2, 3, 4), (4, 9, 7), (1, 1, 1), (3, 5, 2)]


def tensorly_error(pairs: Pairs, ranks, iterations: int) -> float:
    """Relative error of tensorly's Tucker of the formed tensor: HOSVD start, then HOOI."""
    core, factors = tensorly_tucker(pairs.dense(), rank=list(ranks), init="svd", n_iter_max=iterations, tol=0)
    return ((pairs.dense() - torch.einsum("abc,ha,ib,jc->hij", core, *factors)).norm() / pairs.dense().norm()).item()


@pytest.mark.parametrize("ranks", RANKS)
def test_hosvd_is_the_truncated_svd_of_each_unfolding(ranks):
    """tensorly starts its HOOI from the same bases; its own HOSVD error is that of their projection."""
    pairs = random_pairs()
    tensor, bases = pairs.dense(), []
    for mode, rank in enumerate(ranks):
        u, _, _ = svd_interface(tensorly.unfold(tensor, mode), n_eigenvecs=rank)
        bases.append(u)
    ours = hosvd(pairs, ranks)
    for basis, mine in zip(bases, (ours.head, ours.left, ours.right), strict=True):
        torch.testing.assert_close(mine @ mine.mT, basis @ basis.mT, rtol=1e-9, atol=1e-9)  # same subspace
    if ranks != (4, 9, 7):
        other = hosvd(random_pairs(seed=1), ranks).left
        assert not torch.allclose(other @ other.mT, bases[1] @ bases[1].mT, atol=1e-3)


@pytest.mark.parametrize("ranks", RANKS)
def test_hooi_reaches_tensorlys_error_and_is_at_most_hosvds(ranks):
    pairs = random_pairs()
    ours = relative_distance(pairs, as_pairs(hooi(pairs, ranks, 200))).item()
    assert ours == pytest.approx(tensorly_error(pairs, ranks, 200), rel=1e-6, abs=1e-12)
    start = relative_distance(pairs, as_pairs(hosvd(pairs, ranks))).item()
    assert ours <= start + 1e-12
    if ranks in ((2, 3, 4), (3, 5, 2)):
        assert ours < start * (1 - 1e-4)  # there is something to refine


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(2, 8), st.integers(2, 8), st.integers(1, 3), st.integers(0, 50), st.data())
def test_hooi_never_loses_to_hosvd(heads, rows, columns, width, seed, data):
    pairs = random_pairs(heads, rows, columns, width, seed)
    ranks = tuple(data.draw(st.integers(1, size)) for size in (heads, rows, columns))
    errors = [relative_distance(pairs, as_pairs(f(pairs, ranks))).item() for f in (hooi, hosvd)]
    assert errors[0] <= errors[1] + 1e-7  # exact ones differ by the rounding of Grams
