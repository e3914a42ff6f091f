"""Statistics of settings over seeds: mean and spread, Pareto fronts, the cost to reach an accuracy, bootstrap over seeds."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 2000
BOOTSTRAP_SEED = 0
CONFIDENCE = 0.95


class Bounds(NamedTuple):
    """Bounds of a number that may not be known exactly.

    Both are equal if it is known, (x, inf) if it is more than x, (0, x) if it is less.
    """

    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return significant(self.low)
        if math.isinf(self.high):
            return f">{significant(self.low)}" if self.low > 0 else "?"
        return f"<{significant(self.high)}" if self.low <= 0 else f"{significant(self.low)}-{significant(self.high)}"

    def over(self, divisor: float) -> "Bounds":
        """Returns the bounds of the number divided by a positive one."""
        return Bounds(self.low / divisor, self.high / divisor)


class Interval(NamedTuple):
    """An interval whose ends may be bounds themselves: where resamples leave the range that was measured."""

    lower: Bounds
    upper: Bounds

    def __str__(self) -> str:
        return f"[{self.lower}, {self.upper}]"


def significant(value: float) -> str:
    """Returns '0.85', '6.1', '12.3': two figures below ten, three above."""
    return f"{value:.2g}" if abs(value) < 9.95 else f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def mean(values: Sequence[float] | Floats) -> float:
    """Returns the arithmetic mean of some values."""
    return float(np.mean(values))


def sample_std(values: Sequence[float] | Floats) -> float | None:
    """Returns the standard deviation with n - 1; None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def pooled_std(first: Floats, second: Floats) -> float:
    """Returns the sample standard deviation about two means, from both groups; they have more than one value each."""
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in (first, second))
    return math.sqrt(squares / (len(first) + len(second) - 2))


def pareto_front(costs: Sequence[float] | Floats, values: Sequence[float] | Floats) -> list[int]:
    """Returns indices of the points to which no other is both cheaper and better, from cheap to expensive; of ties the first.

    Args:
        costs: the less the better.
        values: the more the better.
    """
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i])):
        if not front or values[index] > values[front[-1]]:
            front.append(index)
    return front


class Front:
    """The Pareto front of one method, as a curve of value over log cost."""

    def __init__(self, costs: Sequence[float] | Floats, values: Sequence[float] | Floats) -> None:
        front = pareto_front(costs, values)
        self.largest = float(max(costs))
        self.costs = np.array([costs[i] for i in front], dtype=float)
        self.values = np.array([values[i] for i in front], dtype=float)

    def cost_to_reach(self, value: float) -> Bounds:
        """Returns the cost at which the front reaches a value, linear in the value and the log of the cost.

        Returns:
            More than the method's largest cost, front or not, if no setting reaches the value; less than the smallest cost if the
            cheapest setting already exceeds it.
        """
        if value > self.values[-1]:
            return Bounds(self.largest, math.inf)
        if value < self.values[0]:
            return Bounds(0.0, float(self.costs[0]))
        cost = float(np.exp(np.interp(value, self.values, np.log(self.costs))))
        return Bounds(cost, cost)


def resampled_counts(num_seeds: int) -> Floats:
    """Returns how often each seed is drawn in each bootstrap resample, (RESAMPLES, num_seeds); the same at every call."""
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    return generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=RESAMPLES).astype(float)


def resampled_means(scores: Floats) -> Floats:
    """Returns means of settings in each resample. All settings get the same seeds: the runs of a seed share their dense start.

    Args:
        scores: (settings, seeds), NaN where a setting lacks a seed; that seed's draws then do not count for it.

    Returns:
        (RESAMPLES, settings); NaN where none of the drawn seeds has that setting.
    """
    counts = resampled_counts(scores.shape[1])
    there = ~np.isnan(scores)
    totals, drawn = counts @ np.where(there, scores, 0.0).T, counts @ there.T.astype(float)
    return np.divide(totals, drawn, out=np.full_like(totals, np.nan), where=drawn > 0)


def interval(samples: Sequence[Bounds]) -> Interval:
    """Returns the central 95% of resampled numbers, as wide as their bounds allow; its ends are order statistics."""
    tail = (1 - CONFIDENCE) / 2
    pairs = np.array(samples)
    (low, low_at_most), (high_at_least, high) = (
        map(float, np.quantile(pairs, q, axis=0, method="inverted_cdf")) for q in (tail, 1 - tail)
    )
    lower = Bounds(low, low) if low > 0 else Bounds(0.0, low_at_most)
    return Interval(lower, Bounds(high, high) if math.isfinite(high) else Bounds(high_at_least, high))
