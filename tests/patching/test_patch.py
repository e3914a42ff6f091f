"""patch, plan, unpatch on small timm ViTs."""

import copy
import random
import re

import numpy as np
import pytest
import torch
from torch import nn

import vit_tucker as vt
from tests.reference import randomise
from vit_tucker.attention.host import HostSpec
from vit_tucker.data.seeding import seed_everything

SPEC = HostSpec(embed_dim=24, num_heads=4, head_dim=6, out_dim=24)
TUCKER = vt.TuckerConfig(ranks=(3, 6, 6))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, options) for name in vt.list_methods() for options in ({}, {"qkv_bias": False})),
        ("tucker", {"reg_tokens": 2, "init_values": 0.1}),  # what is around the attention is alike for all
        ("gqa", {"class_token": False, "global_pool": "avg"}),
    ],
    ids=str,
)
def test_full_rank_patch_reproduces_the_logits(make_vit, images, name, options):
    """Logits agree to 1e-9 in float64, and to 1e-4 in float32, as after other orders of summation."""
    model = make_vit(depth=2, **options)
    reference = model(images)
    config = vt.get_method(name).full_rank(SPEC)
    single = copy.deepcopy(model).float()
    report = vt.patch(model, config)
    torch.testing.assert_close(model(images), reference, rtol=1e-9, atol=1e-9)
    assert max(max(x.pre_error, x.post_error) for x in report.layers) < 1e-12
    vt.patch(single, config)
    assert ((single(images.float()) - reference).norm() / reference.norm()) < 1e-4


@pytest.mark.parametrize("name", vt.list_methods())
def test_compressing_patch_changes_the_logits(make_vit, images, name):
    model = make_vit()
    reference = model(images)
    config = vt.get_method(name).example(SPEC)
    if config == vt.get_method(name).full_rank(SPEC):
        config = config.model_copy(update={"init": "random"})  # nothing to compress: other weights must show
    vt.patch(model, config)
    assert not torch.allclose(model(images), reference, rtol=1e-2)


def test_unpatch_restores_the_original_tensors(make_vit, images):
    model = make_vit()
    reference, state = model(images), copy.deepcopy(model.state_dict())
    originals = {name: module for name, module in model.named_modules() if name.endswith(".attn")}
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    vt.patch(model, TUCKER)
    assert vt.patch_record(model).config == TUCKER
    vt.unpatch(model)
    assert all(model.get_submodule(name) is module for name, module in originals.items())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(model(images), reference)
    with pytest.raises(vt.PatchError, match="not patched"):
        vt.unpatch(model)


def test_training_the_patch_leaves_the_originals_alone(make_vit, images):
    model = make_vit(qk_norm=True)
    reference = model(images)
    vt.patch(model, vt.GQAConfig(num_kv_heads=2))
    model.train()
    model(images).sum().backward()
    torch.optim.SGD(
        [p for m in model.modules() if isinstance(m, vt.AttentionModule) for p in m.parameters()], 1.0
    ).step()
    vt.unpatch(model)
    assert torch.equal(model.eval()(images), reference)


def test_originals_need_not_be_kept(make_vit):
    model = make_vit()
    vt.patch(model, TUCKER, keep_originals=False)
    with pytest.raises(vt.PatchError, match="not kept"):
        vt.unpatch(model)


def test_plan_gives_the_same_report_and_touches_nothing(make_vit, images):
    model = make_vit().train()
    reference, state = model(images), copy.deepcopy(model.state_dict())
    modules = dict(model.named_modules())
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    planned = vt.plan(model, TUCKER)
    assert torch.equal(torch.rand(3), expected)
    assert not planned.notes
    assert dict(model.named_modules()) == modules
    assert model.training
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(model(images), reference)
    assert not planned.applied
    applied = vt.patch(model, TUCKER)
    assert applied.applied
    assert applied.layers == planned.layers


def test_report_counts_what_is_there(make_vit):
    model = make_vit()
    dense = sum(p.numel() for b in model.blocks for p in b.attn.parameters())
    report = vt.patch(model, TUCKER, layers="1-")
    assert report.params_after == sum(p.numel() for b in model.blocks[1:] for p in b.attn.parameters())
    assert report.params_before == dense // 3 * 2
    assert report.left_alone == ("blocks.0.attn",)
    assert [x.name for x in report.layers] == ["blocks.1.attn", "blocks.2.attn"]
    spec_tokens = 17  # 16 patches and the class token
    assert report.layers[0].flops_after == TUCKER.count_flops(SPEC, spec_tokens)
    assert report.layers[0].flops_before == vt.MHAConfig().count_flops(SPEC, spec_tokens)
    text = str(report)
    for part in (
        "blocks.1-2.attn",
        "ranks=3,6,6",
        f"{report.params_before:,} -> {report.params_after:,}",
        f"{100 * report.params_after / report.params_before:.1f}%",
        "left alone (1)",
    ):
        assert part in text
    assert report.to_dict()["layers"][0]["params_after"]["weights"] == TUCKER.count_parameters(SPEC).weights


def test_layers_exclude_and_rules(make_vit):
    model = make_vit()
    rules = ({"layers": "0-1", "ranks": (4, 8, 8)}, {"layers": "blocks.1.attn", "ranks": (2, 4, 4), "shared_kv": True})
    config = vt.TuckerConfig(ranks=(3, 6, 6), rules=rules)
    options = {x.name: x.options for x in vt.plan(model, config).layers}
    assert options == {
        "blocks.0.attn": "ranks=4,8,8",
        "blocks.1.attn": "ranks=2,4,4 shared_kv=True",  # the later rule wins
        "blocks.2.attn": "ranks=3,6,6",
    }
    excluded = vt.plan(model, TUCKER, layers=["blocks.*.attn"], exclude=-1)
    assert [x.name for x in excluded.layers] == ["blocks.0.attn", "blocks.1.attn"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (vt.TuckerConfig(ranks=(5, 6, 6)), "blocks.0.attn: ranks=.*head rank 5 is above its full rank 4"),
        (vt.GQAConfig(num_kv_heads=3), "blocks.0.attn: num_kv_heads=3 must divide"),
        (vt.TuckerConfig(ranks=(3, 6, 6), layers="attn"), "'attn' matches no attention module"),
        (vt.TuckerConfig(ranks=(3, 6, 6), layers=[0], exclude=[0]), "leave no attention module"),
        (vt.TuckerConfig(ranks=(3, 6, 6), rules=({"layers": 9, "ranks": (1, 1, 1)},)), "index 9 is outside"),
        (
            vt.TuckerConfig(ranks=(3, 6, 6), layers=[0], rules=({"layers": 1, "ranks": (1, 1, 1)},)),
            r"rules\[0\]: layers=1 selects no patched module",
        ),
        (
            vt.TuckerConfig(ranks=(3, 6, 6), rules=({"layers": 1, "rank": 3},)),
            r"rules\[0\]: unknown option 'rank'.*'ranks'",
        ),
        (
            vt.TuckerConfig(ranks=(3, 6, 6), rules=({"layers": 1, "ranks": 3},)),
            "blocks.1.attn: a rule's ranks is invalid",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("act", [vt.patch, vt.plan])
def test_errors_come_before_any_change(make_vit, images, act, config, message):
    model = make_vit()
    reference, modules = model(images), dict(model.named_modules())
    with pytest.raises(vt.PatchError, match=message) as caught:
        act(model, config)
    assert "\n" not in str(caught.value)
    assert dict(model.named_modules()) == modules
    assert torch.equal(model(images), reference)
    assert vt.patch_record(model) is None


@pytest.mark.parametrize("act", [vt.patch, vt.plan])
def test_patched_and_wrapped_models_are_refused(make_vit, act):
    model = make_vit()
    vt.patch(model, TUCKER)
    with pytest.raises(vt.PatchError, match="already patched"):
        act(model, TUCKER)
    backbone = nn.Sequential(model)  # the record is on the inner model; its layers still tell
    with pytest.raises(vt.PatchError, match="0.blocks.0.attn: already patched"):
        act(backbone, TUCKER)
    with pytest.raises(vt.PatchError, match="the model is a DataParallel: patch the model before"):
        act(nn.DataParallel(make_vit()), TUCKER)
    with pytest.raises(vt.PatchError, match="the model is a OptimizedModule: patch the model before torch.compile"):
        act(torch.compile(make_vit()), TUCKER)


def test_ddp_wrapped_model_is_refused(make_vit, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(make_vit())
        with pytest.raises(vt.PatchError, match="the model is a DistributedDataParallel: .*accelerator.prepare"):
            vt.patch(wrapped, TUCKER)
    finally:
        torch.distributed.destroy_process_group()


def test_mode_dtype_and_requires_grad_follow_the_host(make_vit):
    model = make_vit().bfloat16().train()
    model.blocks[0].eval()
    model.blocks[1].attn.requires_grad_(False)
    vt.patch(model, TUCKER)
    assert [b.attn.training for b in model.blocks] == [False, True, True]
    assert [all(p.requires_grad for p in b.attn.parameters()) for b in model.blocks] == [True, False, True]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    frozen = list(model.blocks[1].attn.parameters())
    assert not any(p.requires_grad for p in frozen)


def test_meta_model_is_patched_without_data(make_vit):
    model = make_vit().to("meta")
    report = vt.patch(model, TUCKER)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert report.layers[0].pre_error is None
    assert report.layers[0].flops_after > 0


def test_random_init_does_not_look_at_the_host(make_vit):
    models = [make_vit(seed=s) for s in (0, 1)]
    for model in models:
        torch.manual_seed(0)
        assert vt.patch(model, vt.TuckerConfig(ranks=(3, 6, 6), init="random")).layers[0].pre_error is None
    assert torch.equal(models[0].blocks[0].attn.pre_core, models[1].blocks[0].attn.pre_core)
    converted = [make_vit(seed=s) for s in (0, 1)]
    for model in converted:
        vt.patch(model, TUCKER)
    assert not torch.equal(converted[0].blocks[0].attn.pre_core, converted[1].blocks[0].attn.pre_core)


@pytest.mark.parametrize("config", [TUCKER, TUCKER.unconverted(), vt.GQAConfig(num_kv_heads=1)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_nothing_is_drawn_from_global_generators(make_vit, images, config, calibrated):
    """Patches leave the generators as they were, failed ones too; each random layer comes from draws of its own."""

    def draws():
        return torch.rand(3), torch.tensor(np.random.random(3)), random.random()  # noqa: NPY002

    models = [make_vit() for _ in range(3)]
    batches = images if calibrated and config.init == "pretrained" else None
    for state in (0, 0, 1):
        seed_everything(state)
        expected = draws()
        seed_everything(state)
        with pytest.raises(vt.PatchError):
            vt.patch(models[0], config, layers=9)
        vt.patch(models[-1], config, calibration=batches)
        for value, drawn in zip(draws(), expected, strict=True):
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(drawn))
        models.insert(0, models.pop())
    last, second, first = ([block.attn.v_proj.weight for block in model.blocks] for model in models)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[0], last[0]) == (config.init == "pretrained")
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("name", vt.list_methods())
def test_random_layers_are_those_that_their_constructors_draw(make_vit, name):
    """Layers are drawn in their order and nothing else is: a seed means the same model in every version."""
    model, config = make_vit(), vt.get_method(name).example(SPEC).model_copy(update={"init": "random"})
    torch.manual_seed(3)
    vt.patch(model, config)
    torch.manual_seed(3)
    expected = [config.build(SPEC, dtype=torch.float64).state_dict() for _ in model.blocks]
    for block, state in zip(model.blocks, expected, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in block.attn.state_dict().items())
    assert any(not torch.equal(value, expected[0][key]) for key, value in expected[1].items())  # twin


@pytest.mark.parametrize("act", [vt.patch, vt.plan])
def test_optimizers_from_before_the_patch_are_noted(make_vit, act):
    """An optimizer is noted if it holds what is replaced, and only as long as it lives."""
    model, other = make_vit(), make_vit()
    optimizer = torch.optim.AdamW(model.parameters())
    (note,) = act(model, TUCKER).notes
    assert re.match(r"an optimizer made before the patch \(AdamW\) .* make it anew", note)
    assert not act(other, TUCKER).notes
    head = make_vit()
    kept = torch.optim.SGD(head.head.parameters())
    assert not act(head, TUCKER).notes
    late = make_vit()
    gone = torch.optim.Adam(late.parameters())
    del gone
    assert not act(late, TUCKER).notes
    assert optimizer
    assert kept


def test_one_module_at_two_places_counts_once(make_vit):
    """A shared module's parameters count once; its operations count at both places, for budgets too."""
    single, shared = make_vit(), make_vit()
    shared.blocks[2].attn = shared.blocks[0].attn
    plain, report = vt.patch(single, TUCKER), vt.patch(shared, TUCKER)
    assert [layer.shared_with for layer in report.layers] == [None, None, "blocks.0.attn"]
    for name in ("params_before", "params_after"):
        assert 3 * getattr(report, name) == 2 * getattr(plain, name)
        assert report.to_dict()[name] == getattr(report, name)
    assert report.params_after == sum(p.numel() for p in {p for b in shared.blocks for p in b.attn.parameters()})
    assert (report.flops_before, report.flops_after) == (plain.flops_before, plain.flops_after)
    assert report.seconds == pytest.approx(sum(layer.seconds for layer in report.layers[:2]))
    assert "blocks.2.attn = blocks.0.attn" in str(report)
    assert "2 modules" in str(report)
    assert [layer.get("shared_with") for layer in report.to_dict()["layers"]] == [None, None, "blocks.0.attn"]
    vt.unpatch(shared)
    chosen = vt.patch(shared, vt.TuckerConfig(ranks=vt.RankRule(flops=0.5, multiple_of=2)))
    assert 0.45 < chosen.flops_after / chosen.flops_before <= 0.5


def test_one_module_at_two_places_is_replaced_by_one(make_vit, images):
    model = make_vit()
    model.blocks[2].attn = model.blocks[0].attn
    with pytest.raises(vt.PatchError, match="blocks.2.attn: is the same module as blocks.0.attn, but the rules"):
        vt.patch(model, vt.TuckerConfig(ranks=(3, 6, 6), rules=({"layers": 2, "ranks": (2, 6, 6)},)))
    vt.patch(model, TUCKER)
    assert model.blocks[2].attn is model.blocks[0].attn
    assert isinstance(model.blocks[1].attn, vt.AttentionModule)
    vt.unpatch(model)
    assert model.blocks[2].attn is model.blocks[0].attn


def test_patched_model_survives_deepcopy_and_unpatches_there(make_vit, images):
    model = make_vit()
    reference = model(images)
    vt.patch(model, TUCKER)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images), model(images))
    vt.unpatch(twin)
    assert torch.equal(twin(images), reference)
    assert isinstance(model.blocks[0].attn, vt.AttentionModule)


@pytest.mark.parametrize("feature", ["qk_norm", "scale_attn_norm"])
def test_norms_are_carried_or_refused(make_vit, images, feature):
    try:
        model = make_vit(**{feature: True})
    except TypeError:
        pytest.skip(f"this timm has no {feature}")
    reference = model(images)
    with pytest.raises(vt.PatchError, match=r"blocks.0.attn: tucker can't carry the host's (qk_norm|scale_norm)"):
        vt.patch(model, TUCKER)
    for name in ("mha", "gqa", "mla"):
        vt.patch(model, vt.get_method(name).full_rank(SPEC))
        torch.testing.assert_close(model(images), reference, rtol=1e-9, atol=1e-9)
        vt.unpatch(model)
    with pytest.raises(vt.PatchError, match="conversion='svd' changes the head bases"):
        vt.patch(model, vt.GQAConfig(num_kv_heads=2, conversion="svd"))


def test_gate_is_carried_or_refused():
    from timm.models.vision_transformer import Attention

    try:
        attention = Attention(24, num_heads=4, qkv_bias=True, gated=True)
    except TypeError:
        pytest.skip("this timm has no gate")
    model = nn.ModuleDict({"attn": randomise(attention)}).double().eval()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    reference = model["attn"](x)
    with pytest.raises(vt.PatchError, match="attn: tucker can't carry the host's gate"):
        vt.patch(model, TUCKER)
    for name in ("mha", "gqa", "mla"):
        vt.patch(model, vt.get_method(name).full_rank(SPEC))
        torch.testing.assert_close(model["attn"](x), reference, rtol=1e-9, atol=1e-9)
        vt.unpatch(model)
