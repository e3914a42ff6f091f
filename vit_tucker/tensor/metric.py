"""Symmetric positive semidefinite metrics: damping, square roots, and what makes a metric useless."""

from typing import NamedTuple

import torch
from torch import Tensor


class Root(NamedTuple):
    """The square root of a metric and its inverse, both symmetric.

    Attributes:
        root: R with R R = M + damping, (..., I, I).
        inverse: R^-1, (..., I, I).
    """

    root: Tensor
    inverse: Tensor


def metric_root(metric: Tensor, damping: float = 0.0) -> Root:
    """Returns the square root of ``metric + damping * mean eigenvalue`` and its inverse, float64.

    Sums of products taken in lower precision can have slightly negative eigenvalues; they count as zero.

    Args:
        metric: (..., I, I), symmetric, positive semidefinite up to rounding.
        damping: relative to the mean eigenvalue; few samples leave directions without any, which only damping makes invertible.

    Raises:
        ValueError: entries that are not finite, no positive eigenvalue, or a singular metric without damping.
    """
    if not torch.isfinite(metric).all():
        raise ValueError("the second moments are not finite")
    metric = metric.double()
    values, vectors = torch.linalg.eigh((metric + metric.mT) / 2)
    values = values.clamp_min(0)
    mean = values.mean(-1, keepdim=True)
    if not (mean > 0).all():
        raise ValueError("the second moments are zero: the inputs are constant")
    values = values + damping * mean
    if (values <= 0).any():
        raise ValueError("the second moments are singular; damping makes them invertible")
    roots = values.sqrt().unsqueeze(-2)
    return Root((vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT)


def identity_root(size: int, like: Tensor) -> Root:
    """Returns the root of the identity metric (size, size), with the device and dtype of ``like``.

    Args:
        size: rows and columns.
        like: a tensor (any shape) of the device and dtype.
    """
    eye = torch.eye(size, dtype=like.dtype, device=like.device)
    return Root(eye, eye)


def covariance(second_moment: Tensor, mean: Tensor) -> Tensor:
    """Returns E[x x^T] - E[x] E[x]^T.

    Args:
        second_moment: (..., I, I) E[x x^T].
        mean: (..., I) E[x].

    Returns:
        (..., I, I).
    """
    return second_moment - mean.unsqueeze(-1) * mean.unsqueeze(-2)


def mean_metric(metrics: Tensor) -> Tensor:
    """Averages the metrics over heads, each scaled to trace 1, so that none dominates.

    Args:
        metrics: (H, J, J) one positive semidefinite metric per head.

    Returns:
        (J, J).
    """
    share = inverse_traces(metrics.diagonal(dim1=-2, dim2=-1).sum(-1))
    return (metrics * share[:, None, None]).mean(0)


def inverse_traces(traces: Tensor) -> Tensor:
    """Returns what scales metrics to trace 1, (H,): zero for those of trace zero.

    Args:
        traces: (H,), not negative.
    """
    return torch.where(traces > 0, 1 / traces.clamp_min(torch.finfo(traces.dtype).tiny), 0.0)


def damped(metric: Tensor, damping: float) -> Tensor:
    """Returns ``metric + damping * mean eigenvalue``, float64: what ``metric_root`` takes the root of.

    Args:
        metric: (I, I), symmetric, positive semidefinite up to rounding.
        damping: relative to the mean eigenvalue.
    """
    eye = torch.eye(len(metric), dtype=torch.float64, device=metric.device)
    return (metric + metric.mT).double() / 2 + damping * metric.diagonal().double().mean().clamp_min(0) * eye


def solve(metric: Tensor, right: Tensor) -> Tensor:
    """Returns ``right @ metric^-1``, by a Cholesky factor: 20 times faster than a root where none is needed.

    Args:
        metric: (I, I), float64, positive definite; what rounding made indefinite goes through ``metric_root``.
        right: (K, I).
    """
    factor, failed = torch.linalg.cholesky_ex(metric)
    if failed or not torch.isfinite(factor).all():
        inverse = metric_root(metric, 1e-12).inverse
        return right @ inverse @ inverse
    return torch.cholesky_solve(right.mT, factor).mT
