"""Which tokens a model reads out: as it does itself, as asked for, or as its attention pooling weighs them."""

import pytest
import timm
import torch

from tests.explain.test_explanation import EXACT, model_and_image
from tests.reference import randomise
from vit_tucker.errors import ExplainError
from vit_tucker.explain.capture import attention_maps, record_attention
from vit_tucker.explain.explanation import explain_image
from vit_tucker.explain.readout import read_out
from vit_tucker.explain.rollout import attention_rollout


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
