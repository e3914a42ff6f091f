"""Allocation of ranks: tables that tell the truth, budgets that hold, near the best there is, better than uniform."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_tucker.tensor import allocation
from vit_tucker.tensor.allocation import least_cost, least_error, minimise, rank_steps, rank_table, third_mode_table
from vit_tucker.tensor.rotary import RotaryPairs, lift, ordinary
from vit_tucker.tensor.tucker import Pairs, hosvd, squared_norm


def pairs(seed=0, heads=3, size=8, width=4, decay=1.0, scale=1.0):
    """Random pairs with falling singular values of the query and key modes."""
    g = torch.Generator().manual_seed(seed)
    falling = scale * torch.logspace(0, -decay, size, dtype=torch.float64).unsqueeze(1)
    left, right = (torch.randn(heads, size, width, generator=g, dtype=torch.float64) * falling for _ in range(2))
    return Pairs(left, right)


def cost(heads=3, size=8):
    return lambda r1, r2, r3: heads * r1 + r1 * r2 * r3 + size * (r2 + r3)


def table(multiple=1, **options):
    heads, size = options.get("heads", 3), options.get("size", 8)
    return rank_table(pairs(**options), (heads, size, size), cost(heads, size), multiple)


def total(tables, triples):
    """Summed cost and squared error."""
    at = [
        tuple(t.ranks[m].tolist().index(r) for m, r in enumerate(triple))
        for t, triple in zip(tables, triples, strict=True)
    ]
    return tuple(sum(getattr(t, kind)[i].item() for t, i in zip(tables, at, strict=True)) for kind in ("cost", "error"))


TABLES = [table(seed=i, decay=d, scale=s) for i, (d, s) in enumerate([(0.3, 1), (2.0, 1), (1.0, 2), (1.5, 0.3)])]
FULL_COST = sum(t.cost[-1, -1, -1].item() for t in TABLES)


@pytest.mark.parametrize("multiple", [1, 3])
def test_tables_hold_the_errors_of_real_decompositions(multiple):
    tensor = pairs()
    found = table(multiple)
    assert found.norm == pytest.approx(squared_norm(tensor).item(), rel=1e-12)
    for index, triple in enumerate(itertools.product(*(r.tolist() for r in found.ranks))):
        core, head, left, right = hosvd(tensor, triple)
        rest = tensor.dense() - torch.einsum("abc,ha,ib,jc->hij", core, head, left, right)
        assert found.triple(index) == triple
        assert found.error.flatten()[index].item() == pytest.approx(rest.square().sum().item(), abs=1e-12 * found.norm)
        assert found.cost.flatten()[index] == cost()(*triple)
    assert found.error[0, 0, 0] > 0.1 * found.error[-1, -1, -1] + 0.1 * found.norm  # rank 1 must not match


@pytest.mark.parametrize("rotary", [False, True])
def test_the_third_mode_alone_has_the_entries_of_the_whole_table(rotary):
    tensor = pairs()
    if rotary:
        numbers = torch.arange(2).expand(3, 2)
        tensor = ordinary(RotaryPairs(*tensor, numbers))
    full = (3, 8, tensor.right.shape[1] if rotary else 8)
    whole = rank_table(tensor, full, cost(), 2, rotary=rotary)
    found = third_mode_table(tensor, full, cost(), 2, rotary=rotary)
    assert [r.tolist() for r in found.ranks] == [[3], [8], whole.ranks[2].tolist()]
    torch.testing.assert_close(found.error, whole.error[-1:, -1:], rtol=1e-9, atol=1e-12 * whole.norm)
    torch.testing.assert_close(found.cost, whole.cost[-1:, -1:])
    assert found.norm == pytest.approx(whole.norm, rel=1e-12)
    assert found.error[0, 0, 0] > 1e-3 * found.norm
    at = whole.at_third(1)
    assert at.triple(0)[2] == whole.ranks[2][1]
    torch.testing.assert_close(at.error[..., 0], whole.error[..., 1])


@pytest.mark.parametrize("columns", [4, 12], ids=["folded", "grouped heads"])
def test_lifted_tensors_with_other_columns_than_the_full_rank(columns):
    """Where folding leaves fewer columns than the full rank, or grouped heads more that are zero, the norm is the tensor's."""
    left, right = pairs()
    given = Pairs(left, torch.nn.functional.pad(right[:, :6], (0, 0, 0, max(0, columns - 6)))[:, :columns])
    for table in (rank_table, third_mode_table):
        found = table(given, (3, 8, 8), cost(), 2, rotary=True)
        assert found.norm == pytest.approx(squared_norm(given).item(), rel=1e-12)
        assert found.error[-1, -1, -1] == pytest.approx(0, abs=1e-12 * found.norm)
        assert found.error[-1, -1, 0] > 1e-3 * found.norm


def test_steps(monkeypatch):
    assert rank_steps(12, 1).tolist() == list(range(1, 13))
    assert rank_steps(20, 8).tolist() == [8, 16, 20]
    assert rank_steps(6, 8).tolist() == [6]
    monkeypatch.setattr(allocation, "MAX_STEPS", 4)
    assert rank_steps(40, 3).tolist() == [12, 24, 36, 40]  # coarser, and still multiples


@settings(max_examples=40, deadline=None)
@given(st.floats(0.15, 1.0), st.sampled_from([1, 2, 4]))
def test_within_the_budget_and_nothing_left_that_fits(share, multiple):
    tables = [table(multiple, seed=i, decay=d) for i, d in enumerate((0.3, 2.0))]
    budget = share * sum(t.cost[-1, -1, -1].item() for t in tables)
    try:
        chosen = least_error(tables, budget)
    except ValueError:
        assert sum(t.cost.min().item() for t in tables) > budget
        return
    used, _ = total(tables, chosen)
    assert used <= budget
    for t, triple in zip(tables, chosen, strict=True):
        here = total([t], [triple])
        better = (t.error < here[1]) & (t.cost - here[0] <= budget - used)
        assert not better.any()


def test_everything_at_full_budget():
    assert least_error(TABLES, FULL_COST) == [(3, 8, 8)] * 4


@pytest.mark.parametrize("triple", [(1, 2, 2), (2, 2, 2), (2, 3, 3), (3, 3, 3), (3, 4, 4), (3, 6, 6)])
def test_beats_uniform_ranks_of_the_same_cost(triple):
    used, error = total(TABLES, [triple] * len(TABLES))
    ours, better = total(TABLES, least_error(TABLES, used))
    assert ours <= used
    assert better < 0.9 * error


def all_choices(tables):
    triples = list(itertools.product(*(r.tolist() for r in tables[0].ranks)))
    return [total(tables, choice) for choice in itertools.product(triples, repeat=len(tables))]


SMALL = [table(seed=i, heads=2, size=5, width=3, decay=d, scale=s) for i, (d, s) in enumerate([(0.5, 1), (2, 2)])]


def test_near_the_best_of_all():
    """Every combination of two small tensors: mostly the best itself; the gaps of so few and small ones are at most 25%."""
    every, ratios = all_choices(SMALL), []
    for budget in range(40, 140, 10):
        best = min(error for used, error in every if used <= budget)
        _, found = total(SMALL, least_error(SMALL, budget))
        assert best <= found * (1 + 1e-12)
        ratios.append(found / best)
    assert max(ratios) < 1.25
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) >= 5


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.9, 0.99])
def test_least_cost_keeps_the_energy_and_is_near_the_cheapest(energy):
    norm = sum(t.norm for t in SMALL)
    chosen = least_cost(SMALL, energy)
    used, error = total(SMALL, chosen)
    assert error <= (1 - energy + 1e-9) * norm
    cheapest = min(used for used, error in all_choices(SMALL) if error <= (1 - energy) * norm)
    assert cheapest <= used <= 1.1 * cheapest


def test_all_the_energy_needs_the_exact_ranks_and_no_more():
    tensor = pairs(heads=3, size=8, width=2)  # 3 heads of width 2: at most 6 of 8
    found = rank_table(tensor, (3, 8, 8), cost())
    assert least_cost([found], 1.0) == [(3, 6, 6)]
    assert least_cost([found], 0.9)[0][1] < 6


def test_a_tensor_that_counts_more_gets_more():
    first, second = least_error([table(seed=0), table(seed=0, scale=10.0)], 180)
    assert first[1] < second[1]


def test_too_small_a_budget_is_named():
    with pytest.raises(ValueError, match="the smallest ranks cost 80, more than 40"):
        least_error(TABLES, 40)


def test_zero_tensors_get_the_least():
    zero = rank_table(Pairs(*(torch.zeros(3, 8, 4, dtype=torch.float64) for _ in range(2))), (3, 8, 8), cost())
    assert least_error([zero, table()], 150)[0] == (1, 1, 1)
    assert least_cost([zero], 0.9) == [(1, 1, 1)]


def test_minimise_with_one_entry_each():
    single = torch.ones(1, 1, 1, dtype=torch.float64)
    assert minimise([single] * 2, [single] * 2, 2.0) == [0, 0]


def test_lifted_keys_that_heads_share_have_more_coordinates_than_their_full_rank():
    """Four heads read two keys of four columns: sixteen lifted coordinates, of which eight hold everything."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(4, 9, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    shared = right[::2].repeat_interleave(2, 0)
    lifted = lift(RotaryPairs(left, shared, torch.arange(2).expand(4, -1)))
    assert lifted.pairs.right.shape[1] == 16
    found = rank_table(lifted.pairs, (4, 9, 8), cost(), 2, rotary=True)
    assert found.error.flatten()[-1] == 0
    assert found.norm == pytest.approx((lifted.pairs.left @ lifted.pairs.right.mT).square().sum().item())
    own = lift(
        RotaryPairs(left, right, torch.arange(2).expand(4, -1))
    )  # the twin: keys of each head's own need all sixteen
    whole = (own.pairs.left @ own.pairs.right.mT).square().sum().item()
    assert rank_table(own.pairs, (4, 9, 8), cost(), 2, rotary=True).norm < 0.99 * whole
