"""Rank rules: what they accept, and costs in their tables that are those of real layers."""

import itertools

import pytest
import torch

import vit_tucker as vt
from tests.reference import make_spec, make_weights
from vit_tucker.attention.variants.mha import MHAConfig
from vit_tucker.attention.variants.tucker.ranks import choose_ranks, full_ranks, layer_tables

SPECS = {
    "biases": make_spec(),
    "no biases": make_spec(qkv_bias=False, proj_bias=False),
    "wide": make_spec(out_dim=30, head_dim=4),
}


def tables(rule, spec, seed=0, calls=1, tokens=10):
    weights = make_weights(spec, seed)
    dense = MHAConfig()
    whole = calls * dense.count_flops(spec, tokens) if rule.flops else dense.count_parameters(spec).total
    return layer_tables(rule, spec, weights.pre_pairs(), weights.post_pairs(), whole, calls, tokens)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("goal", ["budget", "flops"])
def test_costs_are_those_of_the_layers(spec, goal):
    """Parameters of the built module, and the method's own count of operations, for every pair of entries on a diagonal."""
    found = tables(vt.RankRule(**{goal: 0.5}, multiple_of=5), spec, calls=3, tokens=11)
    for a, b in itertools.zip_longest(range(found.pre.cost.numel()), range(found.post.cost.numel()), fillvalue=0):
        config = vt.TuckerConfig(ranks=found.pre.triple(a), post_ranks=found.post.triple(b))
        cost = found.fixed + found.pre.cost.flatten()[a].item() + found.post.cost.flatten()[b].item()
        if goal == "budget":
            assert cost == config.count_parameters(spec).total
        else:
            assert cost == 3 * config.count_flops(spec, 11)
    built = config.build(spec)
    assert config.count_parameters(spec).total == sum(p.numel() for p in built.parameters())


def test_full_energy_is_exact_and_less_is_not():
    spec = make_spec()
    rule = vt.RankRule(energy=1.0, multiple_of=1)
    ((pre, post),) = choose_ranks(rule, [tables(rule, spec)])
    assert (pre, post) == full_ranks(spec)
    less = vt.RankRule(energy=0.9, multiple_of=1)
    ((pre, post),) = choose_ranks(less, [tables(less, spec)])
    assert sum(pre) < sum(full_ranks(spec)[0])


def test_budgets_hold_over_all_layers_together():
    spec = make_spec()
    rule = vt.RankRule(budget=0.4, multiple_of=4)
    chosen = choose_ranks(rule, [tables(rule, spec, seed) for seed in range(3)])
    used = sum(vt.TuckerConfig(ranks=a, post_ranks=b).count_parameters(spec).total for a, b in chosen)
    dense = 3 * MHAConfig().count_parameters(spec).total
    assert 0.35 * dense < used <= 0.4 * dense
    assert all(r % 4 == 0 for pair in chosen for triple in pair for r in triple[1:])


@pytest.mark.parametrize("share", [0.3, 0.4, 0.6])
def test_a_cache_is_spent_as_the_best_of_all_divisions(share):
    """Every division of the cache over two layers' keys and values; evenly is worse where the layers differ."""
    spec = make_spec()
    rule = vt.RankRule(cache=share, multiple_of=4)
    layers = []
    for seed, size in ((0, 1.0), (1, 0.3)):
        weights = make_weights(spec, seed)
        falling = torch.logspace(0, -1.5, spec.embed_dim, dtype=torch.float64)[:, None]
        pre, post = (
            pair._replace(right=size * pair.right * falling) for pair in (weights.pre_pairs(), weights.post_pairs())
        )
        layers.append(layer_tables(rule, spec, pre, post, 1.0, 1, 1))
    errors = [dict(zip(table.ranks[2].tolist(), table.error[-1, -1].tolist(), strict=True))
              for layer in layers for table in (layer.pre, layer.post)]  # fmt: skip
    limit = share * 4 * spec.kv_dim
    best = min(sum(error[width] for error, width in zip(errors, widths, strict=True))
               for widths in itertools.product(*errors) if sum(widths) <= limit)  # fmt: skip
    widths = [ranks[2] for pair in choose_ranks(rule, layers) for ranks in pair]
    assert sum(widths) <= limit
    found = sum(error[width] for error, width in zip(errors, widths, strict=True))
    assert best <= found <= best * (1 + 1e-9)
    even = max(width for width in errors[0] if 4 * width <= limit)
    assert sum(error[even] for error in errors) > 1.05 * found


@pytest.mark.parametrize("goal", [{"cache": 0.2}, {"cache": 0.2, "budget": 0.9}, {"budget": 0.9}, {"energy": 0.9}])
def test_no_rank_is_more_than_the_others_fill(goal):
    """A mode has no more directions than the product of the other two ranks: what is above costs parameters and holds nothing."""
    spec = make_spec()
    rule = vt.RankRule(**goal, multiple_of=2)
    ((pre, post),) = choose_ranks(rule, [tables(rule, spec)])
    assert all(middle <= heads * width for heads, middle, width in (pre, post))
    if goal == {"cache": 0.2}:
        assert pre[1] == pre[0] * pre[2] < full_ranks(spec)[0][1]


def test_too_small_budgets_name_the_smallest_that_works():
    spec = make_spec()
    rule = vt.RankRule(budget=0.01)
    with pytest.raises(ValueError, match=r"the smallest ranks need 0\.\d{4}$") as error:
        choose_ranks(rule, [tables(rule, spec)])
    enough = vt.RankRule(budget=float(str(error.value).split()[-1]))
    choose_ranks(enough, [tables(enough, spec)])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give one of budget, flops, energy"),
        (
            {"budget": 0.1, "energy": 0.9},
            "give one of budget, flops, energy, cache, or budget and cache, not budget and energy",
        ),
        ({"budget": 0.0}, "greater than 0"),
        ({"energy": 1.5}, "less than or equal to 1"),
        ({"budgt": 0.1}, "ranks.budgt: unknown key; did you mean 'budget'\\?"),
        ({"budget": 0.1, "multiple_of": 0}, "greater than or equal to 1"),
    ],
)
def test_invalid_rules_are_refused(given, message):
    with pytest.raises(vt.ConfigError, match=message):
        vt.TuckerConfig(ranks=given)


def test_rules_survive_a_round_trip():
    rule = vt.RankRule(budget=0.2)
    config = vt.TuckerConfig(ranks=rule, rules=(vt.Rule(layers="a", chosen_by=rule, ranks=[1, 2, 3]),))
    assert vt.TuckerConfig.model_validate_json(config.model_dump_json(), strict=True) == config
    assert config.without_choices().rules == ()
    assert str(rule) == "{budget: 0.2, multiple_of: 8}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"post_ranks": (1, 2, 2)},
            r"post_ranks=\[1, 2, 2\]: ranks \{budget: 0.2, multiple_of: 8\} choose those of both",
        ),
        ({"shared_kv": True}, "don't support shared_kv"),
    ],
)
def test_options_that_exclude_a_rule_are_refused(options, message):
    config = vt.TuckerConfig(ranks=vt.RankRule(budget=0.2), **options)
    with pytest.raises(vt.PatchError, match=message):
        config.check(make_spec())


def test_a_config_with_a_rule_refuses_to_build():
    with pytest.raises(vt.PatchError, match="they are chosen when a model is patched"):
        vt.TuckerConfig(ranks=vt.RankRule(budget=0.2)).build(make_spec())
    assert torch.is_tensor(vt.TuckerConfig(ranks=(1, 2, 2)).build(make_spec()).pre_core)
