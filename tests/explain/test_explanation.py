"""Pictures of one image's attention: whose attention, which patches, rollout over whole models, and where there is none."""

import pytest
import timm
import torch
from timm.models.vision_transformer_sam import VisionTransformerSAM

import vit_tucker as vt
from tests.conftest import randomise
from tests.explain.test_rollout import whole_map
from tests.patching.test_families import FAMILIES, image, small_model
from vit_tucker.errors import ExplainError
from vit_tucker.explain.capture import attention_maps, record_attention
from vit_tucker.explain.explanation import explain_image
from vit_tucker.explain.flow import parallel_groups
from vit_tucker.explain.readout import read_out
from vit_tucker.explain.rollout import attention_rollout, with_residual

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


def test_other_queries_on_demand():
    model, x = model_and_image("vit_small_patch16_dinov3")
    found = explain_image(model, x, queries="class")
    maps = attention_maps(model, x[None])
    row = attention_rollout(maps)[0, 0, 5:]
    torch.testing.assert_close(found.rollout.flatten().double(), row / row.mean(), **EXACT)
    assert (found.rollout - explain_image(model, x).rollout).abs().max() > 1e-3
    with pytest.raises(ExplainError, match="has no class token here; choose patches"):
        explain_image(*model_and_image("vit_wee_patch16_reg1_gap_256"), queries="class")
    with pytest.raises(ExplainError, match="queries 'klass': one of auto, class, patches; did you mean 'class'"):
        explain_image(model, x, queries="klass")


def test_attention_pooling_weighs_the_patches():
    model, x = model_and_image("vit_base_patch16_siglip_224")
    found = explain_image(model, x)
    assert found.flow.source == "attention pooling"
    pool, tokens = model.attn_pool, model.forward_features(x[None])
    q = pool.q(pool.latent.expand(1, -1, -1)).view(1, 1, pool.num_heads, -1).transpose(1, 2)
    k = pool.kv(tokens).view(1, tokens.shape[1], 2, pool.num_heads, -1)[:, :, 0].transpose(1, 2)
    weights = (q @ k.mT / pool.head_dim**0.5).softmax(-1).mean(1)
    row = attention_rollout(attention_maps(model, x[None]), start=weights)[0, 0]
    torch.testing.assert_close(found.rollout.flatten().double(), row * len(row), **EXACT)
    assert (found.rollout - explain_image(model, x, queries="patches").rollout).abs().max() > 1e-3


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
    ("name", "obstacle"),
    [
        ("maxvit_rmlp_pico_rw_256", r"\(AvgPool2d\) mixes tokens between the attention layers"),
        ("davit_tiny", r"cpe2.proj \(Conv2d\) mixes tokens between the attention layers"),
        ("crossvit_tiny_240", r"\(CrossAttention\) mixes tokens between the attention layers"),
        ("volo.VOLO", r"\(ClassAttention\) reads the tokens out by attention of its own"),
    ],
)
def test_no_rollout_where_something_else_mixes_tokens(name, obstacle):
    import re

    found = explain_image(*model_and_image(name))
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


def test_keys_on_a_coarser_grid_have_maps_but_no_places():
    model = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)).eval()
    x = torch.randn(3, 64, 64)
    assert next(iter(attention_maps(model, x[None]).values())).shape[-2:] == (256, 4)
    found = explain_image(model, x)
    assert found.unplaced[0] == "stages.0.blocks.0.attn"
    assert "can't be known" in found.obstacle


def test_layers_side_by_side_are_one_step():
    names = ["blocks.0.attns.0.attn", "blocks.0.attns.1.attn", "blocks.1.attns.0.attn", "other"]
    assert parallel_groups(names) == [names[:2], names[2:3], names[3:]]


def test_chosen_layers_do_not_change_rollout():
    model, x = model_and_image("vit_tiny_patch16_224")
    some, every = explain_image(model, x, layers=1), explain_image(model, x)
    assert list(some.heads) == ["blocks.1.attn"]
    assert torch.equal(some.rollout, every.rollout)
    assert some.map_bytes == dict.fromkeys(every.heads, 4 * 17 * 17 * 8)


def test_a_pool_over_all_tokens():
    try:
        options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 4, "global_pool": "avg"}
        model = timm.create_model("vit_tiny_patch16_224", pool_include_prefix=True, **options)
    except TypeError:
        pytest.skip("this timm pools patches only")
    grid = record_attention(randomise(model).eval(), torch.zeros(1, 3, 32, 32)).grids["blocks.0.attn"]
    chosen = read_out(model, grid)
    assert chosen.label == "mean over all tokens"
    torch.testing.assert_close(chosen.rows(grid), torch.full((17,), 1 / 17))
