"""Linear layers converted for the tokens that they see: optimal there, better on unseen inputs, means kept, misuse refused."""

import copy

import pytest
import timm
import torch
from torch import nn

import vit_tucker as vt
from tests.conversion.test_calibrate import pictures
from tests.hosts.decoders import make_decoder, tokens
from tests.reference import randomise
from vit_tucker.conversion import calibrate_linear
from vit_tucker.hosts.slot import get_slot

MLPS = "blocks.*.mlp.*"
SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 5}


def small_vit(dtype=torch.float64):
    return randomise(timm.create_model("vit_tiny_patch16_224", **SIZES)).to(dtype).eval()


def low_rank(rank=6, layers=MLPS, **options):
    calibration = vt.Calibration(**options) if options else None
    return vt.LowRankLinearConfig(rank=rank, layers=layers, calibration=calibration)


def seen_by(model, name, images):
    found = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, args, output: found.append((args[0], output))
    )
    with torch.no_grad():
        model(images)
    handle.remove()
    return tuple(part.flatten(0, -2) for part in found[0])


@pytest.mark.parametrize("name", ["blocks.0.mlp.fc1", "blocks.1.mlp.fc2"])
def test_the_output_error_is_the_least_of_its_rank(name):
    """With objective="layer": no change of a factor lowers the error on the calibration tokens; the report has that error."""
    model, images = small_vit(), pictures(24)
    x, y = seen_by(model, name, images)
    report = vt.patch(model, low_rank(layers=name, objective="layer", damping=1e-9), calibration=[images])
    layer = model.get_submodule(name)

    def error():
        with torch.no_grad():
            return ((layer(x) - y).norm() / (y - y.mean(0)).norm()).item()

    least = error()
    assert report.layers[0].output_error == pytest.approx(least, rel=1e-9)
    torch.testing.assert_close(layer(x).mean(0), y.mean(0), rtol=1e-10, atol=1e-10)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        kept = parameter.detach().clone()
        for sign in (1, -1):
            with torch.no_grad():
                step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(kept + sign * 1e-3 * step * kept.abs().mean())
            assert error() > least * (1 - 1e-9)
        with torch.no_grad():
            parameter.copy_(kept)
    plain = small_vit()
    vt.patch(plain, low_rank(layers=name))
    with torch.no_grad():
        assert (plain.get_submodule(name)(x) - y).norm() / (y - y.mean(0)).norm() > 1.05 * least


@pytest.mark.parametrize("objective", ["features", "likelihood", "layer"])
def test_calibrated_conversions_are_nearer_on_unseen_images(objective):
    distances = []
    for options in ({}, {"objective": objective}):
        model, unseen = small_vit(), pictures(16, seed=1)
        reference = model(unseen).detach()
        vt.patch(model, low_rank(**options), calibration=pictures(64).split(16) if options else None)
        distances.append(((model(unseen) - reference).norm() / reference.norm()).item())
    assert distances[1] < 0.8 * distances[0]


def test_full_rank_stays_exact_and_the_model_as_it_was():
    model, images = small_vit(), pictures(24)
    state, expected = copy.deepcopy(model.state_dict()), model(images).detach()
    report = vt.patch(model, low_rank(24), calibration=[images])
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)
    assert max(row.output_error for row in report.layers) < 1e-7
    assert report.layers[0].seconds > 0
    vt.unpatch(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_do_not_fit_into_memory_together_are_summed_in_turns(monkeypatch):
    states = []
    for limit in (2**30, 1):
        monkeypatch.setattr(calibrate_linear, "SUM_BYTES", limit)
        model = small_vit()
        vt.patch(model, low_rank(objective="layer"), calibration=pictures(24).split(8))
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_padding_of_language_models_counts_nowhere():
    ids, lengths = tokens(4, 12), torch.tensor([12, 7, 9, 12])
    mask = torch.arange(12) >= 12 - lengths[:, None]
    padded = {"input_ids": ids * mask, "attention_mask": mask.long()}
    single = [row[12 - length :][None] for row, length in zip(ids, lengths, strict=True)]
    weights = []
    for given in (padded, single, padded["input_ids"]):
        model = make_decoder("llama")
        vt.patch(model, low_rank(8, "*.mlp.*", objective="layer"), calibration=given)
        weights.append(
            torch.cat([m.dense_weights().weight.flatten() for m in model.modules() if isinstance(m, vt.LinearModule)])
        )
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)  # RMSNorm computes in float32
    assert (weights[0] - weights[2]).norm() > 1e-3 * weights[0].norm()


def test_composes_with_calibrated_attention():
    model, images = small_vit(), pictures(24)
    vt.patch(model, vt.TuckerConfig(ranks=(4, 6, 6), calibration=vt.Calibration()), calibration=[images])
    report = vt.patch(model, low_rank(objective="layer"), calibration=[images])
    assert all(0 < row.output_error < 1 for row in report.layers)
    assert "output error" in str(report)
    assert isinstance(model.blocks[0].mlp.fc1, vt.LinearModule)
    assert type(vt.dense_model(model).blocks[0].mlp.fc1) is nn.Linear


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv", "blocks.1.attn.proj"])
def test_projections_of_attention_are_found_by_patterns_of_their_own(name):
    model, images = small_vit(), pictures(24)
    expected = model(images).detach()
    report = vt.patch(
        model, low_rank(24, name.replace("0", "*").replace("1", "*"), objective="layer"), calibration=[images]
    )
    assert [row.name for row in report.layers] == [name.replace("1", "0"), name.replace("0", "1")]
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(vt.PatchError, match=r"its (qkv|proj) is a .*LowRankLinear, not a Linear"):
        vt.patch(model, "tucker", ranks=(2, 8, 8))
    vt.unpatch(model, slot="linear")
    vt.patch(model, "tucker", ranks=(2, 8, 8))
    with pytest.raises(vt.PatchError, match="matches no linear layer"):
        vt.patch(model, low_rank(4, "blocks.*.attn.*"))


def test_convolutions_of_one_pixel_are_found_by_patterns_of_their_own():
    model = randomise(timm.create_model("poolformer_s12", num_classes=5)).double().eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
    assert not [name for name in get_slot("linear").find(model, None) if "mlp" in name]
    for options in ({}, {"objective": "features"}):
        config = low_rank(64, "stages.0.blocks.*.mlp.*", **options)
        report = vt.patch(model, config, calibration=[images] if options else None)
        assert len(report.layers) == 4
        assert report.params_after > report.params_before  # full rank
        torch.testing.assert_close(model(images), expected, rtol=1e-8, atol=1e-8)
        dense = vt.dense_model(model)
        assert type(dense.stages[0].blocks[0].mlp.fc1) is nn.Conv2d
        torch.testing.assert_close(dense(images), expected, rtol=1e-8, atol=1e-8)
        vt.unpatch(model)
    assert vt.patch(model, low_rank(8, "stages.0.blocks.*.mlp.*")).flops_after < report.flops_before


def test_a_projection_whose_weight_others_read_is_refused():
    model = timm.create_model("beit_base_patch16_224", depth=1, num_classes=5, img_size=32, embed_dim=24, num_heads=4)
    with pytest.raises(vt.PatchError, match=r"^blocks.0.attn.qkv: is never called: .*; leave it out$"):
        vt.patch(model, low_rank(4, "blocks.*.attn.qkv"))
    assert len(vt.patch(model, low_rank(4, "blocks.*.attn.proj")).layers) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine_steps": 3}, "calibration: refine_steps is for attention; .* leave it out"),
        ({"sequential": True}, "calibration: sequential is for attention; .* leave it out"),
        ({"images": 0}, "images"),
        ({"layers": "head"}, "head: calibration: no tokens reached the layer: .*objective='likelihood'"),
        (
            {"layers": "head", "objective": "layer"},
            "head: calibration: no tokens reached the layer: .*objective='likelihood'",
        ),
    ],
)
def test_misuse_is_one_line(options, message):
    model = small_vit()
    with pytest.raises(vt.VitTuckerError, match=message) as caught:
        vt.patch(model, low_rank(**{"rank": 4, "objective": "features"} | options), calibration=[pictures(4)])
    assert "\n" not in str(caught.value)
    assert vt.patch_record(model, "linear") is None
    with pytest.raises(vt.PatchError, match="calibration is set but there are no images"):
        vt.patch(model, low_rank(objective="layer"))
