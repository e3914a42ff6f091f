"""Allocation of ranks: within the budget, better than uniform, near the best there is, and on the grid asked for."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_tucker.tensor.allocation import TensorModes, allocate, energy_ranks, round_up


def falling(size, decay, scale=1.0):
    return scale * torch.logspace(0, -decay, size, dtype=torch.float64)


def tensor(heads=3, size=6, decay=2.0, scale=1.0):
    modes = (falling(heads, decay / 2, scale), falling(size, decay, scale), falling(size, decay, scale))
    return TensorModes(modes, (heads, size, size), lambda r: heads * r[0] + r[0] * r[1] * r[2] + size * (r[1] + r[2]))


def total(tensors, ranks):
    cost = sum(t.cost(r) for t, r in zip(tensors, ranks, strict=True))
    return cost, sum(t.error(r) for t, r in zip(tensors, ranks, strict=True))


TENSORS = [tensor(decay=1.0), tensor(decay=4.0), tensor(decay=2.0, scale=5.0), tensor(decay=3.0, scale=0.1)]
FULL_COST = sum(t.cost(t.full) for t in TENSORS)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.2, 1.0), st.sampled_from([1, 2, 4]))
def test_within_the_budget_and_nothing_left_that_fits(share, multiple):
    try:
        ranks = allocate(TENSORS, share * FULL_COST, multiple)
    except ValueError:
        return
    cost, _ = total(TENSORS, ranks)
    assert cost <= share * FULL_COST
    for t, r in zip(TENSORS, ranks, strict=True):
        assert all(1 <= a <= b for a, b in zip(r, t.full, strict=True))
        for mode in (1, 2):
            assert r[mode] % multiple == 0 or r[mode] == t.full[mode]
            raised = list(r)
            raised[mode] = round_up(r[mode] + 1, multiple, t.full[mode])
            assert r[mode] == t.full[mode] or cost + t.cost(tuple(raised)) - t.cost(r) > share * FULL_COST


def test_everything_at_full_budget():
    assert allocate(TENSORS, FULL_COST) == [t.full for t in TENSORS]


@pytest.mark.parametrize("triple", [(1, 2, 2), (2, 2, 2), (2, 3, 3), (3, 3, 3), (3, 4, 4)])
def test_beats_uniform_ranks_of_the_same_cost(triple):
    uniform = [triple] * len(TENSORS)
    cost, error = total(TENSORS, uniform)
    ours, better = total(TENSORS, allocate(TENSORS, cost))
    assert ours <= cost
    assert better < error


def test_near_the_best_of_all():
    """Every combination of two small tensors: greedy is not optimal, but close."""
    pair = [tensor(2, 4, 1.5), tensor(2, 4, 3.0, 2.0)]
    triples = list(itertools.product((1, 2), range(1, 5), range(1, 5)))
    for budget in (60, 80, 100):
        fitting = [total(pair, r) for r in itertools.product(triples, repeat=2)]
        best = min(error for cost, error in fitting if cost <= budget)
        _, found = total(pair, allocate(pair, budget))
        assert best <= found <= 1.25 * best + 1e-12


def test_a_tensor_that_counts_more_gets_more():
    first, second = allocate([tensor(scale=1.0), tensor(scale=100.0)], 150)
    assert sum(second) > sum(first)
    assert second[1] >= first[1]


def test_too_small_a_budget_is_named():
    with pytest.raises(ValueError, match="the smallest ranks cost 64, more than 40"):
        allocate(TENSORS, 40)


def test_energy_ranks():
    t = tensor(heads=4, size=8, decay=3.0)
    for energy in (0.5, 0.9, 0.99, 1.0):
        ranks = energy_ranks(t, energy)
        for mode, rank in enumerate(ranks):
            kept = t.energies[mode][:rank].sum() / t.energies[mode].sum()
            assert kept >= energy - 1e-12
            assert rank == 1 or t.energies[mode][: rank - 1].sum() / t.energies[mode].sum() < energy
    assert energy_ranks(t, 1.0) == (4, 8, 8)
    head, query, key = energy_ranks(t, 0.9, multiple=8)
    assert (query, key) == (8, 8)
    assert head == energy_ranks(t, 0.9)[0]
