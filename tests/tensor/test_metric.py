"""Roots of metrics: inverses, damping, and metrics that are useless."""

import pytest
import torch

from vit_tucker.tensor.metric import covariance, metric_root


def random_metric(size=7, rank=7, seed=0):
    x = torch.randn(size, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.mT


def test_root_squares_to_the_metric_and_inverse_inverts():
    metric = random_metric()
    root, inverse = metric_root(metric)
    torch.testing.assert_close(root @ root, metric, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(root @ inverse, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-9)
    assert not torch.allclose(root @ root, 1.001 * metric, rtol=1e-6)


def test_damping_is_relative_to_the_mean_eigenvalue():
    metric = random_metric()
    damped = metric_root(metric, 0.1).root
    expected = metric + 0.1 * metric.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(damped @ damped, expected, rtol=1e-12, atol=1e-12)
    scaled = metric_root(1e-12 * metric, 0.1).root
    torch.testing.assert_close(scaled * 1e6, damped, rtol=1e-9, atol=1e-9)


def test_slightly_negative_eigenvalues_count_as_zero():
    metric = random_metric(rank=3)
    metric -= 1e-14 * torch.eye(7, dtype=torch.float64)
    root, inverse = metric_root(metric, 1e-3)
    assert torch.isfinite(inverse).all()
    torch.testing.assert_close(root @ inverse, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-9)


def test_batches_of_metrics():
    metrics = torch.stack([random_metric(seed=s) for s in range(3)])
    roots = metric_root(metrics, 1e-3).root
    for metric, root in zip(metrics, roots, strict=True):
        torch.testing.assert_close(metric_root(metric, 1e-3).root, root)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (torch.zeros(3, 3), "the inputs are constant"),
        (torch.full((3, 3), float("nan")), "not finite"),
        (torch.diag(torch.tensor([1.0, 0.0])), "singular"),
    ],
)
def test_useless_metrics_are_named(metric, message):
    with pytest.raises(ValueError, match=message):
        metric_root(metric)


def test_covariance():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    found = covariance(x.mT @ x / 50, x.mean(0))
    torch.testing.assert_close(found, torch.cov(x.mT, correction=0), rtol=1e-12, atol=1e-12)
