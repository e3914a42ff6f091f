"""Rollout over whole models: windows, merged patches, padding, tokens that join late; and where it is not defined."""

import re

import pytest
import timm
import torch
from timm.models.vision_transformer_sam import VisionTransformerSAM

import vit_tucker as vt
from tests.explain.test_explanation import EXACT, model_and_image
from tests.explain.test_rollout import whole_map
from tests.reference import randomise
from vit_tucker.explain.capture import attention_maps, record_attention
from vit_tucker.explain.explanation import explain_image
from vit_tucker.explain.flow import parallel_groups
from vit_tucker.explain.rollout import attention_rollout, with_residual


@pytest.mark.parametrize("patched", [False, True], ids=["dense", "tucker"])
def test_rollout_through_swins_windows_is_that_of_whole_maps(patched):
    model, x = model_and_image("swin_tiny_patch4_window7_224")
    if patched:
        vt.patch(model, vt.full_rank_config(model, "tucker"))
    recording = record_attention(model, x[None])
    rows = torch.full((1, 64), 1 / 64, dtype=torch.float64)
    layers = [(recording.maps[name], grid) for name, grid in recording.grids.items()]
    for number, (attn, grid) in reversed(list(enumerate(layers))):
        rows = rows @ whole_map(with_residual(attn.mean(1)), grid)
        if number == 2:  # from 8x8 patches to the 16x16 of which each has merged four
            rows = rows.view(8, 8).repeat_interleave(2, 0).repeat_interleave(2, 1).view(1, 256) / 4
    found = explain_image(model, x)
    torch.testing.assert_close(found.rollout.flatten().double(), rows[0] * 256, **EXACT)
    assert [tuple(h.shape) for h in found.heads.values()] == [(2, 16, 16)] * 2 + [(4, 8, 8)] * 2
    assert all(
        h.mean().item() == pytest.approx(1, abs=1e-5) for h in found.heads.values()
    )  # all attention is somewhere


@pytest.mark.parametrize(
    ("name", "options", "obstacle"),
    [
        ("maxvit_rmlp_pico_rw_256", {}, r"\(AvgPool2d\) mixes tokens between the attention layers"),
        ("davit_tiny", {}, r"cpe2.proj \(Conv2d\) mixes tokens between the attention layers"),
        (
            "crossvit_tiny_240",
            {"depth": ((1, 1, 0), (1, 1, 0))},
            r"\(CrossAttention\) mixes tokens between the attention layers",
        ),
        ("volo.VOLO", {}, r"\(ClassAttention\) reads the tokens out by attention of its own"),
    ],
)
def test_no_rollout_where_something_else_mixes_tokens(name, options, obstacle):
    found = explain_image(*model_and_image(name, **options))
    assert found.rollout is None
    assert re.search(obstacle, found.obstacle)
    assert found.heads
    assert not found.unplaced


def test_only_patches_move_between_patches_in_tnt():
    model, x = model_and_image("tnt_s_patch16_224")
    found = explain_image(model, x)
    outer = {name: attn for name, attn in attention_maps(model, x[None]).items() if name.endswith("attn_out")}
    row = attention_rollout(outer)[0, 0, 1:]
    torch.testing.assert_close(found.rollout.flatten().double(), row / row.mean(), **EXACT)


@pytest.mark.parametrize("patched", [False, True], ids=["dense", "tucker"])
def test_sams_padded_windows(patched):
    options = {"img_size": 40, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = randomise(
        VisionTransformerSAM(window_size=3, global_attn_indexes=(1,), use_rel_pos=False, **options)
    ).eval()
    if patched:
        vt.patch(model, vt.full_rank_config(model, "tucker"))
    x = torch.randn(3, 40, 40, generator=torch.Generator().manual_seed(0))
    recording = record_attention(model, x[None])
    (windows, whole), (cut, grid) = recording.maps.values(), recording.grids.values()
    assert (windows.shape, whole.shape) == ((4, 2, 9, 9), (1, 2, 25, 25))
    rows = (
        torch.full((1, 25), 1 / 25) @ with_residual(whole.mean(1))[0] @ whole_map(with_residual(windows.mean(1)), cut)
    )
    found = explain_image(model, x)
    torch.testing.assert_close(found.rollout.flatten(), rows[0] / rows.mean(), **EXACT)
    assert found.flow.prefix_share == pytest.approx(1 - rows.sum().item(), abs=1e-5)  # what padding got
    assert grid.is_whole


def test_a_class_token_that_joins_later():
    model = randomise(
        timm.create_model("convit_tiny", img_size=64, embed_dim=12, num_heads=4, depth=3, local_up_to_layer=1)
    )
    x = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    maps, found = attention_maps(model, x[None]), explain_image(model.eval(), x)
    assert [attn.shape[-1] for attn in maps.values()] == [16, 17, 17]
    first, *later = maps.values()
    row = attention_rollout(later)[0, 0, 1:] @ with_residual(first.mean(1))[0]
    torch.testing.assert_close(found.rollout.flatten(), row / row.mean(), **EXACT)
    assert found.flow.prefix_share == pytest.approx(1 - row.sum().item(), abs=1e-5)


def test_layers_side_by_side_are_one_step():
    names = ["blocks.0.attns.0.attn", "blocks.0.attns.1.attn", "blocks.1.attns.0.attn", "other"]
    assert parallel_groups(names) == [names[:2], names[2:3], names[3:]]
