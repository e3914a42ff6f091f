"""Pictures of one image's attention: whose attention, which patches, which layers."""

import pytest
import timm
import torch

from tests.patching.test_families import FAMILIES, image, small_model
from vit_tucker.explain.capture import attention_maps
from vit_tucker.explain.explanation import explain_image
from vit_tucker.explain.rollout import attention_rollout

EXACT = {"rtol": 1e-5, "atol": 1e-5}
"""Pictures are float32, the models float64."""


def model_and_image(name, **options):
    model = small_model(name, **options)
    return model, image(model, FAMILIES[name].get("img_size"))[0]


@pytest.mark.parametrize(
    ("name", "options", "label", "first", "last"),
    [
        ("vit_tiny_patch16_224", {}, "class token", 0, 1),
        ("vit_tiny_patch16_224", {"reg_tokens": 4}, "class token", 0, 1),
        ("deit_tiny_distilled_patch16_224", {}, "class and distillation token", 0, 2),
        ("vit_wee_patch16_reg1_gap_256", {}, "mean over patches", 1, None),
        ("vit_small_patch16_dinov3", {}, "mean over patches", 5, None),
        ("vit_relpos_small_patch16_224", {}, "mean over patches", 0, None),
    ],
)
def test_heads_and_rollout_of_what_the_model_reads_out(name, options, label, first, last):
    model, x = model_and_image(name, **options)
    found = explain_image(model, x, head_fusion="max", discard_ratio=0.3)
    assert (found.queries, found.flow.source, found.obstacle) == (label, label, "")
    maps = attention_maps(model, x[None])
    tokens = next(iter(maps.values())).shape[-1]
    prefix = tokens - found.rollout.numel()
    for layer, attn in maps.items():
        expected = attn[0, :, first:last, prefix:].mean(1) * tokens
        torch.testing.assert_close(found.heads[layer].flatten(1).double(), expected, **EXACT)
    row = attention_rollout(maps, head_fusion="max", discard_ratio=0.3)[0, first:last].mean(0)
    patches = row[prefix:]
    torch.testing.assert_close(found.rollout.flatten().double(), patches / patches.mean(), **EXACT)
    assert found.flow.prefix_share == pytest.approx(row[:prefix].sum().item(), abs=1e-5)
    plain = explain_image(model, x)
    assert (plain.rollout - found.rollout).abs().max() > 1e-3


def test_keys_on_a_coarser_grid_have_maps_but_no_places():
    model = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)).eval()
    x = torch.randn(3, 64, 64)
    assert next(iter(attention_maps(model, x[None]).values())).shape[-2:] == (256, 4)
    found = explain_image(model, x)
    assert found.unplaced[0] == "stages.0.blocks.0.attn"
    assert "can't be known" in found.obstacle


def test_chosen_layers_do_not_change_rollout():
    model, x = model_and_image("vit_tiny_patch16_224")
    some, every = explain_image(model, x, layers=1), explain_image(model, x)
    assert list(some.heads) == ["blocks.1.attn"]
    assert torch.equal(some.rollout, every.rollout)
    assert some.map_bytes == dict.fromkeys(every.heads, 4 * 17 * 17 * 8)
