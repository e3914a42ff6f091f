"""Read-outs from moments: against a direct least-squares fit, the exactness of a right prior, and the optimality of low rank."""

import pytest
import torch

from vit_tucker.tensor.metric import Root, metric_root
from vit_tucker.tensor.regression import LinearMoments, reduced_rank_readout, ridge_readout
from vit_tucker.tensor.tucker import Tucker

H, R3, O, N = 3, 4, 9, 400
EYE = Root(torch.eye(O, dtype=torch.float64), torch.eye(O, dtype=torch.float64))


def data(noise=0.1, seed=0):
    g = torch.Generator().manual_seed(seed)
    f = torch.randn(N, H * R3, generator=g, dtype=torch.float64) @ torch.randn(H * R3, H * R3, generator=g).double() + 5
    truth = torch.randn(O, H * R3, generator=g, dtype=torch.float64)
    y = f @ truth.mT - 2 + noise * torch.randn(N, O, generator=g, dtype=torch.float64)
    weights = torch.rand(N, generator=g, dtype=torch.float64) + 0.1
    moments = LinearMoments.like(f[:100], y[:100], centre=True)
    for start in range(0, N, 100):
        part = slice(start, start + 100)
        moments.add(f[part], y[part], weights[part])
    return f, y, weights, truth, moments


def prior(ranks, seed=1):
    g = torch.Generator().manual_seed(seed)
    r1, r2, r3 = ranks
    core, head, left = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((r1, r2, r3), (H, r1), (O, r2)))
    return Tucker(core, torch.linalg.qr(head).Q, left, torch.empty(0))


def matrix(t):
    return (t.left @ torch.tensordot(t.head, t.core, 1)).transpose(0, 1).flatten(1)


def weighted_loss(readout, f, y, weights):
    f, y = f - (weights @ f) / weights.sum(), y - (weights @ y) / weights.sum()
    return ((y - f @ readout.mT).square().sum(1) * weights).sum().item() / weights.sum().item()


def test_streamed_moments_are_those_of_the_whole():
    f, y, weights, _, moments = data()
    ff, yf, f_mean, y_mean = moments.centred(True)
    total = weights.sum()
    torch.testing.assert_close(f_mean, weights @ f / total)
    torch.testing.assert_close(y_mean, weights @ y / total)
    centred = f - f_mean
    torch.testing.assert_close(ff, (centred * weights[:, None]).mT @ centred / total)
    torch.testing.assert_close(yf, ((y - y_mean) * weights[:, None]).mT @ centred / total)


def test_ridge_readout_is_weighted_least_squares():
    f, y, weights, truth, moments = data()
    ff, yf, *_ = moments.centred(True)
    found, _ = ridge_readout(ff, yf, torch.zeros_like(yf), 1e-12)
    root = weights.sqrt()[:, None]
    augmented = torch.cat([f, torch.ones(N, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(augmented * root, y * root).solution[:-1].mT
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, truth, rtol=1e-6)  # the noise is there


def test_a_right_prior_stays_whatever_the_ridge():
    *_, truth, moments = data(noise=0.0)
    ff, yf, *_ = moments.centred(True)
    for damping in (1e-6, 1.0):
        torch.testing.assert_close(ridge_readout(ff, yf, truth, damping)[0], truth, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(ridge_readout(ff, yf, torch.zeros_like(truth), 1.0)[0], truth, rtol=1e-3)


@pytest.mark.parametrize("r2", [1, 4, 8])
def test_reduced_rank_regression_is_the_best_of_its_rank(r2):
    *_, moments = data(noise=1.0)
    ff, yf, *_ = moments.centred(True)
    out_root = metric_root(torch.diag(torch.logspace(0, -2, O, dtype=torch.float64)))
    found = reduced_rank_readout(ff, yf, prior((H, r2, R3)), 1e-9, out_root)
    # Eckart-Young for the whitened full read-out
    full, metric = ridge_readout(ff, yf, torch.zeros_like(yf), 1e-9)
    root = metric_root(metric)
    u, s, vh = torch.linalg.svd(out_root.root @ full @ root.root)
    expected = out_root.inverse @ (u[:, :r2] * s[:r2]) @ vh[:r2] @ root.inverse
    torch.testing.assert_close(matrix(found), expected, rtol=1e-3, atol=1e-4)  # the features' condition number is 1e4
    assert (s[r2:] > 1e-6).any()  # the rank binds


def test_cut_head_rank_improves_by_turns_and_stays_above_the_full():
    f, y, weights, _, moments = data(noise=1.0)
    ff, yf, *_ = moments.centred(True)
    losses = [
        weighted_loss(matrix(reduced_rank_readout(ff, yf, prior((2, 5, R3)), 1e-9, EYE, sweeps=k)), f, y, weights)
        for k in (0, 1, 3, 20)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]
    full = weighted_loss(matrix(reduced_rank_readout(ff, yf, prior((H, 5, R3)), 1e-9, EYE)), f, y, weights)
    assert full < losses[-1] < weighted_loss(matrix(prior((2, 5, R3))), f, y, weights)
