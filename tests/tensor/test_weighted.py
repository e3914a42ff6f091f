"""Weighted decompositions: exact at full rank, better in their norm than any other, the same as plain ones without weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tensor.test_mode_ranks import random_pairs
from vit_tucker.tensor.metric import metric_root
from vit_tucker.tensor.tucker import hosvd
from vit_tucker.tensor.weighted import head_weights, mean_metric, weighted_tucker, whitened_hosvd

H, I, J, D = 4, 11, 10, 3


def metric(size, seed=0, decay=2.0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return basis * torch.logspace(0, -decay, size, dtype=torch.float64) @ basis.mT


def metrics(heads=H, size=J):
    return torch.stack([(i + 1) * metric(size, seed=i) for i in range(heads)])


def dense(t):
    return torch.einsum("abc,ha,ib,jc->hij", *t)


def weighted_error(tensor, approximation, left, rights, damping):
    """sum_i ||L dW_i R_i||^2 by its formula, with the damping of the solver."""
    root = metric_root(left, damping).root
    total = 0.0
    for difference, right in zip(tensor - approximation, rights, strict=True):
        eye = torch.eye(len(right), dtype=right.dtype)
        damped = right + damping * right.diagonal().mean() * eye
        total += (root @ difference @ damped @ difference.mT @ root).trace().item()
    return total


def test_identity_metrics_give_the_plain_hosvd():
    pairs = random_pairs(H, I, J, D)
    eye_left, eye_right = torch.eye(I, dtype=torch.float64), torch.eye(J, dtype=torch.float64)
    expected = dense(hosvd(pairs, (2, 5, 4)))
    torch.testing.assert_close(
        dense(whitened_hosvd(pairs, (2, 5, 4), eye_left, eye_right)), expected, rtol=1e-9, atol=1e-9
    )
    other = dense(whitened_hosvd(pairs, (2, 5, 4), metric(I), eye_right))
    assert not torch.allclose(other, expected, rtol=1e-2)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(2, 9), st.integers(1, 4), st.integers(0, 50))
def test_exact_at_full_rank(heads, rows, columns, width, seed):
    pairs = random_pairs(heads, rows, columns, width, seed)
    full = (heads, min(rows, heads * width), min(columns, heads * width))
    rights = torch.stack([metric(columns, seed=i) for i in range(heads)])
    for steps in (0, 5):
        found = dense(weighted_tucker(pairs, full, metric(rows, 7), rights, steps=steps))
        torch.testing.assert_close(found, pairs.dense(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 5, 5), (4, 2, 6), (1, 1, 1)])
def test_refined_beats_whitened_beats_plain_in_the_weighted_norm(ranks):
    pairs, left, rights, damping = random_pairs(H, I, J, D), metric(I, 9), metrics(), 1e-3
    tensor = pairs.dense()
    candidates = [
        weighted_tucker(pairs, ranks, left, rights, damping),
        weighted_tucker(pairs, ranks, left, rights, damping, steps=0),
        hosvd(pairs, ranks),
    ]
    errors = [weighted_error(tensor, dense(c), left, rights, damping) for c in candidates]
    assert errors[0] < errors[1]
    assert errors[0] < 0.8 * errors[2]
    if ranks != (1, 1, 1):
        assert errors[1] < errors[2]


def test_refined_is_a_local_minimum():
    pairs, left, rights = random_pairs(H, I, J, D), metric(I, 9), metrics()
    found = weighted_tucker(pairs, (3, 4, 4), left, rights, 1e-3, steps=300)
    best = weighted_error(pairs.dense(), dense(found), left, rights, 1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        moved = [f + 1e-3 * torch.randn(f.shape, generator=generator, dtype=f.dtype) * f.abs().mean() for f in found]
        assert weighted_error(pairs.dense(), dense(type(found)(*moved)), left, rights, 1e-3) > best * (1 - 1e-6)


def test_a_quiet_head_of_influence_survives_a_cut_head_mode():
    """Without head weights the head mode keeps the loud heads and drops the one that counts."""
    pairs = random_pairs(3, 8, 8, 2)
    pairs.left[2] *= 0.01  # small in numbers ...
    rights = torch.eye(8, dtype=torch.float64).repeat(3, 1, 1) * torch.tensor([1.0, 1.0, 1e6])[:, None, None]
    eye = torch.eye(8, dtype=torch.float64)
    weighted = dense(whitened_hosvd(pairs, (2, 6, 6), eye, eye, weights=head_weights(rights)))
    plain = dense(whitened_hosvd(pairs, (2, 6, 6), eye, eye))
    quiet = pairs.dense()[2]
    assert (weighted[2] - quiet).norm() < 0.3 * quiet.norm()
    assert (plain[2] - quiet).norm() > 0.9 * quiet.norm()


def test_a_given_right_basis_is_kept():
    pairs, left, rights = random_pairs(H, I, J, D), metric(I, 9), metrics()
    basis = torch.randn(J, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = weighted_tucker(pairs, (3, 4, 4), left, rights, right=basis)
    assert torch.equal(found.right, basis)
    start = weighted_tucker(pairs, (3, 4, 4), left, rights, right=basis, steps=0)
    errors = [weighted_error(pairs.dense(), dense(t), left, rights, 1e-3) for t in (found, start)]
    assert errors[0] < errors[1]


def test_mean_metric_and_head_weights():
    two = torch.stack([metric(5), 100 * metric(5, seed=1)])
    assert mean_metric(two).diagonal().sum() == pytest.approx(1)
    assert head_weights(two).tolist() == pytest.approx([0.1, 1.0])
    with pytest.raises(ValueError, match="constant"):
        head_weights(torch.zeros(2, 3, 3))
    one_dead = torch.stack([torch.zeros(5, 5, dtype=torch.float64), metric(5)])
    assert torch.isfinite(mean_metric(one_dead)).all()
    assert head_weights(one_dead).tolist() == [1e-3, 1.0]
