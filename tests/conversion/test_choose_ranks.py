"""Ranks chosen for whole models: budgets kept, better than uniform, recorded, and chosen anew only when asked for."""

import json

import pytest
import torch

import vit_tucker as vt
from tests.conversion.test_calibrate import distance, pictures
from vit_tucker.patching.record import patch_record


def rule(**options):
    return vt.TuckerConfig(ranks=vt.RankRule(multiple_of=2, **options))


def uneven(make_vit, **options):
    """Layers of different inner dimension: the first's weights have rank 2 per head, the last's queries hardly matter."""
    model = make_vit(depth=4, **options)
    with torch.no_grad():
        q, k, v = model.blocks[0].attn.qkv.weight.view(3, 4, 6, 24)
        for matrix in (q, k, v):
            matrix[:, 2:] *= 0.05
        model.blocks[3].attn.qkv.weight.view(3, 4, 6, 24)[0] *= 0.02
    return model


def chosen(model):
    return [block.attn.ranks for block in model.blocks]


@pytest.mark.parametrize("budget", [0.2, 0.4, 0.7])
def test_parameter_budgets_hold(make_vit, budget):
    model = uneven(make_vit)
    report = vt.patch(model, rule(budget=budget))
    assert 0.93 * budget < report.params_after / report.params_before <= budget
    assert report.params_after == sum(p.numel() for block in model.blocks for p in block.attn.parameters())
    assert len(set(chosen(model))) > 1


def test_flops_budgets_hold(make_vit):
    report = vt.patch(uneven(make_vit), rule(flops=0.5))
    assert 0.45 < report.flops_after / report.flops_before <= 0.5


@pytest.mark.parametrize("ranks", [(4, 6, 6), (3, 8, 8), (4, 12, 12)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_better_than_uniform_ranks_of_the_same_size(make_vit, ranks, calibrated):
    model, unseen = uneven(make_vit), pictures(seed=1)
    reference = model(unseen).detach()
    images = pictures(64) if calibrated else None
    uniform = vt.patch(model, vt.TuckerConfig(ranks=ranks), calibration=images)
    before = distance(model, reference, unseen)
    vt.unpatch(model)
    report = vt.patch(model, rule(budget=uniform.params_after / uniform.params_before), calibration=images)
    assert report.params_after <= uniform.params_after
    assert distance(model, reference, unseen) < before


def test_energy_keeps_its_share(make_vit):
    model = uneven(make_vit)
    for energy in (0.8, 0.95):
        report = vt.patch(model, rule(energy=energy))
        lost = [error**2 for layer in report.layers for error in (layer.pre_error, layer.post_error)]
        assert 1 - energy >= sum(lost) / len(lost) > 0.5 * (1 - energy)
        vt.unpatch(model)


def test_the_record_holds_the_ranks_and_patches_again_without_choosing(make_vit, images):
    model = uneven(make_vit)
    report = vt.patch(model, rule(budget=0.3))
    record, output = patch_record(model), model(images)
    assert record.config.without_choices() == rule(budget=0.3)
    assert [tuple(r.options["ranks"]) for r in record.config.rules] == [ranks[0] for ranks in chosen(model)]
    assert f"ranks={','.join(map(str, chosen(model)[0][0]))}" in report.layers[0].options
    json.dumps(report.to_dict())
    again = uneven(make_vit, seed=5)  # other weights: the ranks are those of the record all the same
    stored = vt.TuckerConfig.model_validate_json(record.config.model_dump_json())
    vt.patch(again, stored)
    assert chosen(again) == chosen(model)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(images), output)


def test_another_rule_chooses_anew(make_vit):
    model = uneven(make_vit)
    vt.patch(model, rule(budget=0.3))
    stored = patch_record(model).config
    vt.unpatch(model)
    changed = stored.model_copy(update={"ranks": vt.RankRule(budget=0.5, multiple_of=2)})
    report = vt.patch(model, changed)
    assert 0.45 < report.params_after / report.params_before <= 0.5
    assert {r.chosen_by.budget for r in patch_record(model).config.rules} == {0.5}
    vt.unpatch(model)
    vt.patch(model, stored.model_copy(update={"ranks": (2, 4, 4)}))
    assert chosen(model) == [((2, 4, 4), (2, 4, 4))] * 4
    assert patch_record(model).config.rules == ()


def test_groups_of_layers_have_budgets_of_their_own(make_vit):
    model = uneven(make_vit)
    config = vt.TuckerConfig(
        ranks=vt.RankRule(budget=0.3, multiple_of=2),
        rules=(vt.Rule(layers="2-3", ranks={"budget": 0.6, "multiple_of": 2}), vt.Rule(layers=1, ranks=(1, 2, 2))),
    )
    layers = vt.patch(model, config).layers
    dense = layers[0].params_before.total
    assert layers[0].params_after.total <= 0.3 * dense
    assert chosen(model)[1] == ((1, 2, 2), (1, 2, 2))
    assert 0.55 * 2 * dense < sum(layer.params_after.total for layer in layers[2:]) <= 0.6 * 2 * dense


def test_a_module_at_two_places_is_counted_once(make_vit):
    model = make_vit()
    model.blocks[2].attn = model.blocks[0].attn
    report = vt.patch(model, rule(budget=0.4))
    assert model.blocks[2].attn is model.blocks[0].attn
    assert report.layers[0].params_after == report.layers[2].params_after


def test_plans_choose_the_same_ranks(make_vit):
    model = uneven(make_vit)
    planned = vt.plan(model, rule(budget=0.3))
    assert planned.notes == ()
    assert [layer.options for layer in planned.layers] == [
        layer.options for layer in vt.patch(model, rule(budget=0.3)).layers
    ]
    vt.unpatch(model)
    with_images = vt.plan(model, rule(budget=0.3).model_copy(update={"calibration": vt.Calibration()}))
    assert "ranks chosen from the weights alone" in str(with_images)


def test_images_change_the_choice(make_vit):
    model = uneven(make_vit)
    found = []
    for objective in (None, "layer", "features"):
        config, images = rule(budget=0.3), None
        if objective is not None:
            config = config.model_copy(update={"calibration": vt.Calibration(objective=objective)})
            images = pictures(64)
        vt.patch(model, config, calibration=images)
        found.append(chosen(model))
        vt.unpatch(model)
    assert found[0] != found[1]
    assert found[0] != found[2]


def test_refusals(make_vit):
    model = make_vit()
    with pytest.raises(
        vt.PatchError, match=r"ranks \{budget: 0.001, multiple_of: 2\}: too small, the smallest ranks need 0.0975"
    ):
        vt.patch(model, rule(budget=0.001))
    assert patch_record(model) is None
    with pytest.raises(
        vt.PatchError, match=r"blocks.0.attn: ranks .* are chosen from weights, but these are on the meta"
    ):
        vt.plan(make_vit().to("meta"), rule(budget=0.5))


def test_layers_with_one_token_are_refused_by_name(make_vit):
    """Their scores are constant: no rank of them can be chosen by images."""
    model = make_vit(img_size=4, class_token=False, global_pool="avg")
    images = torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(vt.PatchError, match=r"^blocks\.0\.attn: calibration: the second moments are zero"):
        vt.patch(model, rule(budget=0.5), calibration=images)
    assert patch_record(model) is None
