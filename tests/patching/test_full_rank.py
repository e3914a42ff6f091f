"""The config that loses nothing: what it looks like, and what it refuses. That it is exact: test_families.py."""

import pytest
import torch

import vit_tucker as vt
from tests.patching.test_families import small_model
from vit_tucker.hosts.find import find_attention


@pytest.mark.parametrize("method", vt.list_methods())
def test_layers_of_one_shape_need_no_rules(make_vit, method):
    model = make_vit()
    config = vt.full_rank_config(model, method)
    assert config.method == method
    assert config.rules == ()
    assert all(not isinstance(module, vt.AttentionModule) for module in model.modules())


def test_layers_of_other_shapes_have_rules_of_their_own():
    model = small_model("swin_tiny_patch4_window7_224")
    config = vt.full_rank_config(model, "tucker")
    report = vt.plan(model, config)
    heads = {name: module.num_heads for name, module in find_attention(model).items()}
    assert len(set(heads.values())) > 1
    assert [rule.layers for rule in config.rules] == [name for name in heads if heads[name] != config.ranks[0]]
    assert {row.name for row in report.layers} == set(heads)
    with pytest.raises(vt.PatchError, match="above its full rank"):
        vt.plan(model, config.model_copy(update={"ranks": (config.ranks[0] + 1, *config.ranks[1:])}))


def test_a_model_without_its_weights_has_one_too(make_vit):
    model = make_vit(num_heads=3).to("meta")
    assert vt.full_rank_config(model, "gqa") == vt.GQAConfig(num_kv_heads=3)


def test_what_has_no_exact_form_is_refused_by_name(make_vit):
    with pytest.raises(vt.PatchError, match=r"^blocks\.0\.attn: tucker can't carry the host's qk_norm"):
        vt.full_rank_config(make_vit(qk_norm=True), "tucker")
    with pytest.raises(vt.PatchError, match="^Linear has no attention module"):
        vt.full_rank_config(torch.nn.Linear(2, 2), "tucker")
    with pytest.raises(vt.VitTuckerError, match="did you mean 'tucker'"):
        vt.full_rank_config(make_vit(), "tuker")
    model = make_vit()
    vt.patch(model, vt.full_rank_config(model, "mha"))
    with pytest.raises(vt.PatchError, match="already patched"):
        vt.full_rank_config(model, "mha")
