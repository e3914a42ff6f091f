"""The KV cache: what layers say they keep of a token against what keys and values hold, and whole models by hand."""

import pytest
import timm
import torch
from torch import nn

import vit_tucker as vt
from tests.patching.test_families import small_model
from tests.reference import all_configs, make_spec
from vit_tucker.analysis.kv_cache import count_kv_entries

SPEC = make_spec(embed_dim=64, out_dim=64)  # wider than keys and values of all heads together, 2 * 4 * 6
CONFIGS = [
    *all_configs(SPEC),
    vt.MLAConfig(q_lora_rank=8, kv_lora_rank=5, shared_kv=False),
    vt.TuckerConfig(ranks=(3, 8, 5), post_ranks=(2, 4, 7)),
    vt.TuckerConfig(ranks=(3, 8, 5), shared_kv=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_width_is_the_rank_of_keys_and_values(config, monkeypatch):
    """Keys and values of all heads side by side are linear in the token: no cache of fewer numbers gives them back."""
    seen = []
    layer = config.build(SPEC, dtype=torch.float64)
    attend = layer.attend
    monkeypatch.setattr(layer, "attend", lambda q, k, v, *more: seen.append((k, v)) or attend(q, k, v, *more))
    layer.mix(torch.randn(1, 100, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    columns = torch.cat([part.detach()[0].transpose(0, 1).flatten(1) for part in seen[0]], 1)  # (N, G * (Dk + Dv))
    rank = torch.linalg.matrix_rank(columns - columns.mean(0), rtol=1e-9).item()
    assert layer.kv_width == min(rank, columns.shape[1])
    assert rank <= 2 * 4 * 6 < 64  # twin: no full-rank matrix of random numbers


def test_models_by_hand(make_vit):
    """Three layers, 17 tokens, 4 heads of width 6."""
    model = make_vit()
    dense = 17 * 2 * 24
    assert count_kv_entries(model) == 3 * dense
    vt.patch(model, vt.TuckerConfig(ranks=(3, 6, 5), exclude=[0]))
    assert count_kv_entries(model) == dense + 2 * 17 * 2 * 5
    assert count_kv_entries(model) != 3 * dense
    assert count_kv_entries(make_vit(dynamic_img_size=True), 24) == 3 * 37 * 2 * 24


def test_windows_and_grids():
    """Swin: two layers of 16 windows of 16 tokens and width 16, two of 4 windows and width 32. Visformer: 3 heads
    of width 16 on a grid of 4 x 4, of width 32 on 2 x 2, channels first."""
    assert count_kv_entries(small_model("swin_tiny_patch4_window7_224")) == 2 * 256 * 2 * 16 + 2 * 64 * 2 * 32
    model = small_model("visformer_tiny")
    dense = 16 * 2 * 3 * 16 + 4 * 2 * 3 * 32
    assert count_kv_entries(model, 64) == dense
    vt.patch(model, vt.GQAConfig(num_kv_heads=1))
    assert count_kv_entries(model, 64) == dense / 3


def test_unknown_layers_have_no_number(make_vit):
    class OwnAttention(nn.Module):
        num_heads = 4

        def forward(self, x, attn_mask=None, is_causal=False):
            return x

    model = make_vit()
    model.blocks[1].attn = OwnAttention()
    assert count_kv_entries(model) is None
    assert count_kv_entries(timm.create_model("resnet10t")) == 0
