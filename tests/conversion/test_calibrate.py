"""Activation-aware patches of whole models: what they gain, what they leave alone, what they refuse."""

import copy
import json

import pytest
import torch
from torch import nn

import vit_tucker as vt
from tests.reference import all_configs, make_spec
from vit_tucker.conversion import probes

pytestmark = pytest.mark.slow

EXAMPLES = {
    "tucker": vt.TuckerConfig(ranks=(4, 8, 8)),
    "tucker, cut heads": vt.TuckerConfig(ranks=(2, 8, 8)),
    "tucker, shared": vt.TuckerConfig(ranks=(4, 8, 8), shared_kv=True),
    "gqa svd": vt.GQAConfig(num_kv_heads=1, conversion="svd"),
    "gqa mean": vt.GQAConfig(num_kv_heads=1),
    "mla": vt.MLAConfig(q_lora_rank=6, kv_lora_rank=6),
    "mla, two latents": vt.MLAConfig(q_lora_rank=6, kv_lora_rank=6, shared_kv=False),
}


def pictures(count=24, seed=0, dtype=torch.float64):
    """Images with few degrees of freedom, as real ones: tokens that fill no more than some directions."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(10, 3 * 16 * 16, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    mix = torch.randn(count, 10, generator=generator, dtype=torch.float64)
    return (mix @ basis).view(count, 3, 16, 16).to(dtype) / 3


def distance(model, reference, x):
    with torch.no_grad():
        return ((model(x) - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize(
    ("name", "objective"),
    [*((name, "features") for name in EXAMPLES), *((name, "layer") for name in ("tucker", "gqa svd", "mla"))],
)
def test_calibrated_conversions_are_nearer_on_unseen_images(make_vit, name, objective):
    model, unseen = make_vit(), pictures(seed=1)
    reference = model(unseen).detach()
    config = EXAMPLES[name]
    vt.patch(model, config)
    plain = distance(model, reference, unseen)
    vt.unpatch(model)
    config = config.model_copy(update={"calibration": vt.Calibration(objective=objective)})
    report = vt.patch(model, config, calibration=pictures(64).split(16))
    assert distance(model, reference, unseen) < 0.8 * plain
    assert all(0 < layer.output_error < 1 for layer in report.layers)


@pytest.mark.parametrize("config", all_configs(make_spec())[::2], ids=lambda c: c.method)
def test_full_rank_stays_exact(make_vit, images, config):
    model = make_vit()
    reference = model(images)
    report = vt.patch(model, config, calibration=[pictures()])
    torch.testing.assert_close(model(images), reference, rtol=1e-7, atol=1e-7)
    assert max(layer.output_error for layer in report.layers) < 1e-7


def test_works_where_gradients_are_off(make_vit, images):
    first, second = make_vit(), make_vit()
    vt.patch(first, EXAMPLES["tucker"], calibration=[pictures()])
    with torch.no_grad():
        vt.patch(second, EXAMPLES["tucker"], calibration=[pictures()])
    torch.testing.assert_close(second(images), first(images), rtol=0, atol=0)


def test_model_is_left_as_it_was(make_vit):
    model = make_vit().train()
    model.blocks[1].eval()
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    attention = [block.attn for block in model.blocks]
    vt.patch(model, EXAMPLES["tucker"], calibration=[pictures()])
    vt.unpatch(model)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(not a._forward_hooks for a in attention)
    assert all(p.grad is None for p in model.parameters())


def test_same_images_same_result_in_one_group_or_many(make_vit, monkeypatch):
    results = []
    for limit in (2**32, 2**32, 300_000, 1):  # all layers, one of three, none: the model runs for every sweep
        monkeypatch.setattr(probes, "CALL_BYTES", limit)
        model = make_vit()
        vt.patch(model, EXAMPLES["tucker, cut heads"], calibration=pictures().split(8))
        results.append(model.state_dict())
    for other in results[1:]:
        assert all(torch.equal(results[0][k], v) for k, v in other.items())


def test_images_and_loaders(make_vit):
    """A tensor, a list, tuples with labels and a generator are the same images; no more are used than asked for."""
    labels = torch.zeros(8, dtype=torch.long)
    states = []
    for batches in (
        pictures(8),
        [pictures(8)],
        [(pictures(8), labels)],
        (b for b in [pictures(8)]),
        [torch.cat([pictures(8), pictures(8, seed=5)])],
    ):
        model = make_vit(depth=1)
        config = EXAMPLES["tucker"].model_copy(update={"calibration": vt.Calibration(images=8)})
        vt.patch(model, config, calibration=batches)
        states.append(model.state_dict())
    for state in states[1:]:
        assert all(torch.equal(states[0][k], v) for k, v in state.items())


def test_refinement_lowers_the_output_error(make_vit):
    errors = []
    for steps in (0, 80):
        model = make_vit()
        config = vt.TuckerConfig(ranks=(2, 6, 6), calibration=vt.Calibration(refine_steps=steps, refine_lr=5e-3))
        report = vt.patch(model, config, calibration=pictures(64).split(16))
        errors.append([layer.output_error for layer in report.layers])
    gains = [after / before for before, after in zip(*errors, strict=True)]
    assert max(gains) <= 1.02  # held-out sequences decide; on all tokens it may be a little worse
    assert min(gains) < 0.99


def with_norms(make_vit):
    return make_vit(qk_norm=True)


def without_biases(make_vit):
    model = make_vit(qkv_bias=False)
    for block in model.blocks:
        block.attn.proj.register_parameter("bias", None)  # as by proj_bias=False, which older timm lacks
    return model


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("gqa mean", with_norms),
        ("mla", with_norms),
        *((name, without_biases) for name in ("tucker, cut heads", "tucker, shared", "gqa svd", "mla")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_hosts_with_norms_and_without_biases(make_vit, name, host):
    model, unseen = host(make_vit), pictures(seed=1)
    reference = model(unseen).detach()
    vt.patch(model, EXAMPLES[name])
    plain = distance(model, reference, unseen)
    vt.unpatch(model)
    vt.patch(model, EXAMPLES[name], calibration=pictures(64).split(16))
    assert distance(model, reference, unseen) < plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions(make_vit, dtype):
    model, unseen = make_vit(dtype=dtype), pictures(seed=1, dtype=dtype)
    reference = model(unseen).detach()
    vt.patch(model, EXAMPLES["tucker"])
    plain = distance(model, reference, unseen)
    vt.unpatch(model)
    report = vt.patch(model, EXAMPLES["tucker"], calibration=pictures(64, dtype=dtype).split(16))
    assert distance(model, reference, unseen) < plain
    assert all(p.dtype == dtype for p in model.parameters())
    json.dumps(report.to_dict(), allow_nan=False)


def test_report_tells_output_errors_and_seconds(make_vit):
    model = make_vit()
    plain = vt.patch(model, EXAMPLES["tucker"])
    assert all(layer.output_error is None and layer.seconds > 0 for layer in plain.layers)
    vt.unpatch(model)
    report = vt.patch(model, EXAMPLES["tucker"], calibration=[pictures()])
    row = report.layers[0]
    assert f"{row.output_error:.4f}" in str(report)
    assert report.to_dict()["layers"][0]["output_error"] == row.output_error
    assert report.seconds == pytest.approx(sum(layer.seconds for layer in report.layers))
    assert vt.patch_record(model).config.calibration == vt.Calibration()
    # the weights are further away than the HOSVD's, the outputs are not: that is the point
    assert row.pre_error > plain.layers[0].pre_error


def test_selection_and_rules_hold(make_vit):
    model = make_vit()
    config = vt.TuckerConfig(ranks=(2, 8, 8), exclude=[0], rules=({"layers": 2, "ranks": (3, 10, 10)},))
    report = vt.patch(model, config, calibration=[pictures()])
    assert [layer.name for layer in report.layers] == ["blocks.1.attn", "blocks.2.attn"]
    assert model.blocks[2].attn.ranks[0] == (3, 10, 10)


def refused(model, config, batches, message):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(vt.PatchError, match=message):
        vt.patch(model, config, calibration=batches)
    assert vt.patch_record(model) is None
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "calibration: no images"),
        ([torch.zeros(3, 16, 16)], r"batch 0 is \(3, 16, 16\), not a float tensor"),
        ([torch.zeros(1, 3, 16, 16, dtype=torch.uint8)], "not a float tensor"),
        ([{"image": 1}], "batch 0 is dict"),
        ([torch.full((1, 3, 16, 16), float("nan"))], "batch 0 holds values that are not finite"),
    ],
)
def test_bad_images_are_refused(make_vit, batches, message):
    refused(make_vit(), EXAMPLES["tucker"], batches, message)


@pytest.mark.parametrize(("shape", "given"), [((3, 24, 16), "3x24x16"), ((1, 16, 16), "1x16x16"), ((3, 2, 2), "3x2x2")])
@pytest.mark.parametrize("objective", ["features", "layer"])
def test_images_of_another_size_are_refused(make_vit, shape, given, objective):
    config = EXAMPLES["tucker"].model_copy(update={"calibration": vt.Calibration(objective=objective)})
    batches = [pictures(4), torch.randn(4, *shape).double()]
    refused(
        make_vit(),
        config,
        batches,
        f"^calibration: batch 1: VisionTransformer takes no images of {given}, its own are 3x16x16: .",
    )
    if shape[0] == 3 and shape[1] > 4:  # where the model takes any size, so does the calibration
        vt.patch(make_vit(dynamic_img_size=True), config, calibration=batches)


def test_models_without_gradients_are_refused(make_vit):
    class Frozen(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        @torch.no_grad()
        def forward(self, x):
            return self.model(x)

    with torch.inference_mode():
        model = make_vit()
    config = EXAMPLES["tucker"]
    refused(
        model, config, [pictures()], "^calibration: the model's weights are inference tensors, .* objective='layer'"
    )
    refused(Frozen(make_vit()), config, [pictures()], "^calibration: the model's features have no gradients")
    config = config.model_copy(update={"calibration": vt.Calibration(objective="layer")})
    for each in (model, Frozen(make_vit())):
        assert max(layer.output_error for layer in vt.patch(each, config, calibration=[pictures()]).layers) < 1


@pytest.mark.parametrize("calibrated", [False, True])
def test_works_in_inference_mode_and_on_its_tensors(make_vit, images, calibrated):
    """Patches in inference mode are those outside of it, and the layers can be trained afterwards."""
    inside, outside = make_vit(), make_vit()
    vt.patch(outside, EXAMPLES["tucker"], calibration=[pictures()] if calibrated else None)
    with torch.inference_mode():
        batches = [pictures()]
        assert batches[0].is_inference()
        vt.patch(inside, EXAMPLES["tucker"], calibration=batches if calibrated else None)
    torch.testing.assert_close(inside(images), outside(images), rtol=0, atol=0)
    inside(images).sum().backward()
    assert inside.blocks[0].attn.pre_core.grad.abs().max() > 0
    again = make_vit()
    vt.patch(again, EXAMPLES["tucker"], calibration=batches if calibrated else None)
    torch.testing.assert_close(again(images), outside(images), rtol=0, atol=0)


def test_few_tokens_are_noted(make_vit):
    """The report notes fewer tokens than columns (17 for 24), and a single image; two images of 17 tokens are enough."""
    config = EXAMPLES["tucker"]
    (few,) = vt.patch(make_vit(), config, calibration=[pictures(1)]).notes
    assert few == (
        "calibration: blocks.0.attn (and 2 more): 17 tokens of 1 image for 24 columns: whitened spectra end there, whatever the "
        "weights are; 25 tokens are needed (2 images)"
    )
    (one,) = vt.patch(make_vit(patch_size=2), config, calibration=[pictures(1)]).notes
    assert one.startswith("calibration: one image")
    assert not vt.patch(make_vit(), config, calibration=[pictures(2)]).notes


def test_all_maps_of_a_model_of_features_count(make_vit):
    """Layers behind the first map count too; where the first map is all, they are refused for having no influence."""
    model = make_vit(features_only=True, out_indices=(0, 2))
    report = vt.patch(model, EXAMPLES["tucker"], calibration=[pictures()])
    assert len(report.layers) == 3
    assert all(0 < layer.output_error < 1 for layer in report.layers)
    first = make_vit(features_only=True, out_indices=(0, 2))
    forward = first.forward
    first.forward = lambda x: forward(x)[:1]
    refused(first, EXAMPLES["tucker"], [pictures()], "model.blocks.1.attn: calibration: .*no influence")


def test_too_few_tokens_are_refused(make_vit):
    config = vt.TuckerConfig(ranks=(4, 20, 20))
    refused(
        make_vit(), config, [pictures(1)], "blocks.0.attn: calibration: 17 tokens are too few for rank 20; give more"
    )


def test_hooi_goes_by_weights_alone(make_vit):
    config = EXAMPLES["tucker"].model_copy(update={"conversion": "hooi"})
    refused(make_vit(), config, [pictures(4)], "blocks.0.attn: conversion='hooi' uses the weights alone")


def test_constant_tokens_are_refused(make_vit):
    model = make_vit(class_token=False, global_pool="avg")
    nn.init.zeros_(model.pos_embed)
    refused(model, EXAMPLES["tucker"], [torch.ones(4, 3, 16, 16).double()], "blocks.0.attn: calibration: .*constant")


def test_calibration_needs_images_and_pretrained_weights(make_vit):
    config = vt.TuckerConfig(ranks=(4, 8, 8), calibration=vt.Calibration())
    refused(make_vit(), config, None, r"no images: patch\(model, config, calibration=batches\)")
    random = config.model_copy(update={"init": "random"})
    refused(make_vit(), random, [pictures()], "init is 'random'")
    planned = vt.plan(make_vit(), config)
    assert planned.layers[0].pre_error is None
    assert planned.layers[0].params_after.total > 0


def test_methods_without_calibration_say_so(make_vit, monkeypatch):
    monkeypatch.setattr(
        "vit_tucker.attention.variants.tucker.layer.TuckerAttention.convert_calibrated",
        vt.AttentionModule.convert_calibrated,
    )
    refused(make_vit(), EXAMPLES["tucker"], [pictures()], "TuckerAttention has no activation-aware conversion")
