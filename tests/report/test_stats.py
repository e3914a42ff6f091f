"""Fronts, interpolation, bootstrap."""

import math

import numpy as np
import pytest

from vit_tucker.report.stats import (
    Bounds,
    Front,
    interval,
    pareto_front,
    pooled_std,
    resampled_counts,
    resampled_means,
    sample_std,
    significant,
)

INF = math.inf


def test_the_front_has_no_dominated_points():
    costs, values = [10, 20, 30, 40, 50], [1.0, 3.0, 2.0, 3.0, 4.0]
    assert pareto_front(costs, values) == [0, 1, 4]  # 30 is worse than 20, 40 no better
    assert pareto_front([5, 5, 5], [1.0, 2.0, 2.0]) == [1]  # of ties the first
    assert pareto_front([3, 2, 1], [1.0, 1.0, 1.0]) == [2]
    assert pareto_front([1], [0.0]) == [0]


def test_costs_are_interpolated_in_their_log():
    front = Front([100, 400, 200], [90.0, 94.0, 80.0])
    assert front.cost_to_reach(92.0).low == pytest.approx(200)  # half-way: the geometric mean of 100 and 400
    assert front.cost_to_reach(92.0).low != pytest.approx(250, rel=0.1)  # the arithmetic one
    assert front.cost_to_reach(90.0).low == pytest.approx(100)
    assert front.cost_to_reach(94.0).high == pytest.approx(400)


def test_beyond_the_front_only_bounds_are_known():
    front = Front([100, 400, 900], [90.0, 94.0, 93.0])
    assert front.cost_to_reach(94.1) == (900, INF)  # its largest setting does not reach it either
    assert front.cost_to_reach(89.9) == (0, 100)


@pytest.mark.parametrize(
    ("bounds", "text"),
    [((6.12, 6.12), "6.1"), ((4.4, INF), ">4.4"), ((0.0, 7.8), "<7.8"), ((2.0, 3.0), "2-3"), ((0.0, INF), "?")],
)
def test_bounds_say_what_is_known(bounds, text):
    assert str(Bounds(*bounds)) == text


def test_significant_figures():
    assert [significant(v) for v in (0.851, 6.14, 12.34, 1234.5)] == ["0.85", "6.1", "12.3", "1234"]


def test_spreads():
    assert sample_std([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert sample_std([1.0]) is None
    assert pooled_std(np.array([1.0, 3.0]), np.array([10.0, 10.0, 10.0])) == pytest.approx(math.sqrt(2 / 3))


def test_resamples_are_the_same_each_time_and_draw_as_many_seeds():
    counts = resampled_counts(5)
    assert (counts.sum(1) == 5).all()
    assert (counts == resampled_counts(5)).all()
    assert counts.mean(0) == pytest.approx(1, abs=0.1)  # 2,000 draws of variance 0.8: 5 standard errors are 0.1
    assert len(np.unique(counts, axis=0)) > 100  # of 126


def test_settings_share_their_resampled_seeds():
    shared = np.array([1.0, 5.0, 9.0, 2.0])
    means = resampled_means(np.array([shared, shared + 1]))
    assert means[:, 1] - means[:, 0] == pytest.approx(1)
    assert means[:, 0].std() > 0.5
    lacking = resampled_means(np.array([[1.0, 3.0], [1.0, np.nan]]))
    assert set(lacking[~np.isnan(lacking[:, 1]), 1]) == {1.0}
    assert np.isnan(lacking[lacking[:, 0] == 3.0, 1]).all()  # only the seed that it lacks was drawn


def test_intervals_leave_out_the_tails_and_keep_bounds():
    known = [Bounds(value, value) for value in np.linspace(1, 2, 1001)]
    assert interval(known).lower.low == pytest.approx(1.025, abs=2e-3)
    assert interval(known).upper.high == pytest.approx(1.975, abs=2e-3)
    censored = [*known[:900], *[Bounds(1.9, INF)] * 101]
    assert str(interval(censored)) == "[1, >1.9]"
    assert str(interval([Bounds(0.0, 0.9)] * 100 + known)) == "[<0.9, 2]"
