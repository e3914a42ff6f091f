"""What is particular to one method: published parameter counts, refusals, conversions."""

import pytest
import torch

import vit_tucker as vt
from tests.reference import make_spec, make_weights
from vit_tucker.attention.variants.gqa import svd_groups
from vit_tucker.errors import PatchError
from vit_tucker.tensor.tucker import Pairs, relative_distance

VIT_B = make_spec(embed_dim=768, num_heads=12, head_dim=64, out_dim=768)


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (vt.MHAConfig(), 2_359_296),
        (vt.GQAConfig(num_kv_heads=1), 1_277_952),
        (vt.MLAConfig(q_lora_rank=16, kv_lora_rank=16), 651_264),
        (vt.TuckerConfig(ranks=(8, 16, 16)), 53_440),
        (vt.TuckerConfig(ranks=(8, 32, 32)), 114_880),
    ],
    ids=str,
)
def test_published_parameters_of_vit_b(config, published):
    """Tucker Attention, arXiv 2603.30033, Table 5: weights per layer of ViT-B/16."""
    assert config.count_parameters(VIT_B).weights == published


@pytest.mark.parametrize(
    ("d", "heads", "g", "c", "r"), [(768, 12, 4, 128, (8, 128, 64)), (2048, 32, 8, 64, (32, 64, 64))]
)
def test_table_1(d, heads, g, c, r):
    """Table 1's formulas, in its own letters."""
    width = d // heads
    spec = make_spec(embed_dim=d, num_heads=heads, head_dim=width, out_dim=d)
    tucker = 2 * (heads * r[0] + r[0] * r[1] * r[2] + d * r[1] + d * r[2])
    rows = {
        vt.MHAConfig(): 4 * d**2,
        vt.GQAConfig(num_kv_heads=1): 2 * d**2 + 2 * width * d,
        vt.GQAConfig(num_kv_heads=g): 2 * d**2 + 2 * g * width * d,
        vt.MLAConfig(q_lora_rank=c, kv_lora_rank=c): d**2 + 5 * d * c,
        vt.MLAConfig(q_lora_rank=c, kv_lora_rank=c, shared_kv=False): d**2 + 6 * d * c,
        vt.TuckerConfig(ranks=r): tucker,
        vt.TuckerConfig(ranks=r, shared_kv=True): tucker - d * r[2],
    }
    for config, formula in rows.items():
        assert config.count_parameters(spec).weights == formula, config
        built = config.build(spec, device="meta")
        assert sum(p.numel() for p in built.parameters() if p.ndim > 1) == formula, config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (vt.GQAConfig(num_kv_heads=3), r"num_kv_heads=3 must divide num_heads=4: one of \[1, 2, 4\]"),
        (vt.MLAConfig(q_lora_rank=25, kv_lora_rank=4), "q_lora_rank=25 is above its full rank 24"),
        (vt.MLAConfig(q_lora_rank=4, kv_lora_rank=25), "kv_lora_rank=25 is above its full rank 24"),
        (vt.TuckerConfig(ranks=(5, 8, 8)), r"ranks=\[5, 8, 8\]: head rank 5 is above its full rank 4"),
        (vt.TuckerConfig(ranks=(4, 25, 8)), "query/output rank 25 is above its full rank 24"),
        (vt.TuckerConfig(ranks=(4, 8, 8), post_ranks=(4, 8, 30)), "post_ranks=.*key/value rank 30"),
        (
            vt.TuckerConfig(ranks=(4, 8, 8), post_ranks=(4, 8, 6), shared_kv=True),
            "equal key and value ranks, not 8 and 6",
        ),
    ],
    ids=str,
)
def test_impossible_options_are_refused(config, message):
    with pytest.raises(PatchError, match=message):
        config.check(make_spec())


def test_registry_refuses_other_classes_and_duplicates():
    assert vt.list_methods()[:4] == sorted(vt.list_methods())[:4]
    assert {"gqa", "mha", "mla", "tucker"} <= set(vt.list_methods())
    with pytest.raises(vt.ConfigError, match="unknown attention method 'tuker'.*did you mean 'tucker'"):
        vt.get_method("tuker")
    with pytest.raises(vt.ConfigError, match="already registered"):

        @vt.register_method("mha")
        class Other(vt.MHAConfig):
            pass

    with pytest.raises(vt.ConfigError, match='must declare method: Literal\\["other"\\]'):
        vt.register_method("other")(vt.MHAConfig)
    with pytest.raises(vt.ConfigError, match="must derive from"):
        vt.register_method("other")(dict)


def test_mean_pooled_gqa_is_the_mean():
    weights = make_weights(make_spec())
    module = vt.GQAConfig(num_kv_heads=2).build(make_spec(), dtype=torch.float64)
    with torch.no_grad():
        module.convert_from(weights)
    expected = torch.cat([weights.key[:2].mean(0), weights.key[2:].mean(0)], -1)
    torch.testing.assert_close(module.k_proj.weight, expected.mT)
    torch.testing.assert_close(
        module.k_proj.bias, torch.cat([weights.key_bias[:2].mean(0), weights.key_bias[2:].mean(0)])
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_svd_conversion_of_gqa_is_the_best_rank_d_basis(groups):
    """No other basis of width D does better on the group's weight tensors: compared with 50 random ones and with the mean."""
    weights = make_weights(make_spec())
    best = svd_groups(weights, groups)
    pre = weights.pre_pairs()

    def error(key: torch.Tensor) -> float:
        keys = key.repeat_interleave(4 // groups, 0)
        projected = Pairs(pre.left, keys @ (keys.mT @ pre.right))
        return relative_distance(pre, projected).item()

    random = [torch.linalg.qr(torch.randn(groups, 24, 6, dtype=torch.float64)).Q for _ in range(50)]
    assert error(best.key) < min(error(q) for q in random)
    mean = vt.GQAConfig(num_kv_heads=groups).build(make_spec(), dtype=torch.float64)
    with torch.no_grad():
        mean.convert_from(weights)
    svd = vt.GQAConfig(num_kv_heads=groups, conversion="svd").build(make_spec(), dtype=torch.float64)
    with torch.no_grad():
        svd.convert_from(weights)
    for side in ("pre_pairs", "post_pairs"):
        reference = getattr(weights, side)()
        assert relative_distance(reference, getattr(svd, side)()) < relative_distance(reference, getattr(mean, side)())


def test_svd_conversion_of_gqa_is_exact_with_all_heads():
    from tests.reference import dense_attention

    weights, spec = make_weights(make_spec()), make_spec()
    module = vt.GQAConfig(num_kv_heads=4, conversion="svd").build(spec, dtype=torch.float64)
    with torch.no_grad():
        module.convert_from(weights)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(module(x), dense_attention(weights, x, spec), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", ["query_bias", "value_bias", "out_bias"])
def test_each_bias_matters_and_is_kept(bias):
    """Dropping one bias of the host changes the output; the full-rank Tucker layer follows (the key bias cancels)."""
    from tests.reference import dense_attention

    spec, weights = make_spec(), make_weights(make_spec())
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    without = type(weights)(**{**vars(weights), bias: torch.zeros_like(getattr(weights, bias))})
    module = vt.TuckerConfig.full_rank(spec).build(spec, dtype=torch.float64)
    with torch.no_grad():
        module.convert_from(weights)
    assert not torch.allclose(dense_attention(without, x, spec), module(x), rtol=1e-3)
    no_key_bias = type(weights)(**{**vars(weights), "key_bias": torch.zeros_like(weights.key_bias)})
    torch.testing.assert_close(dense_attention(no_key_bias, x, spec), module(x), rtol=1e-9, atol=1e-9)


def test_without_query_bias_the_rest_is_exact():
    """The paper's form: at full rank the host without its query bias, which the host itself is not."""
    from tests.reference import dense_attention

    spec, weights = make_spec(), make_weights(make_spec())
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    config = vt.TuckerConfig(ranks=(4, 24, 24), query_bias=False)
    module = config.build(spec, dtype=torch.float64)
    with torch.no_grad():
        module.convert_from(weights)
    assert module.q_proj.bias is None
    assert sum(p.numel() for p in module.parameters()) == config.count_parameters(spec).total
    without = type(weights)(**{**vars(weights), "query_bias": torch.zeros_like(weights.query_bias)})
    torch.testing.assert_close(module(x), dense_attention(without, x, spec), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(module(x), dense_attention(weights, x, spec), rtol=1e-3)
    assert relative_distance(without.pre_pairs(), module.pre_pairs()) < 1e-9
    assert (
        relative_distance(weights.pre_pairs(), module.pre_pairs()) > 1e-2
    )  # what was dropped is in the report's error
    with pytest.raises(PatchError, match="query_bias=False; give the ranks"):
        vt.TuckerConfig(ranks={"budget": 0.5}, query_bias=False).check(spec)


def test_shared_kv_is_one_basis_and_exact_at_full_rank():
    from tests.reference import dense_attention

    spec, weights = make_spec(), make_weights(make_spec())
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    module = vt.TuckerConfig(ranks=(4, 24, 24), shared_kv=True).build(spec, dtype=torch.float64)
    with torch.no_grad():
        module.convert_from(weights)
    assert not any(name.startswith("v_proj") for name, _ in module.named_parameters())
    torch.testing.assert_close(module(x), dense_attention(weights, x, spec), rtol=1e-9, atol=1e-9)


def test_mla_with_two_latents_is_exact_at_full_rank():
    from tests.reference import dense_attention

    spec, weights = make_spec(), make_weights(make_spec())
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    for config, exact in (
        (vt.MLAConfig(q_lora_rank=24, kv_lora_rank=24, shared_kv=False), True),
        (vt.MLAConfig(q_lora_rank=24, kv_lora_rank=23, shared_kv=False), False),
        (vt.MLAConfig(q_lora_rank=23, kv_lora_rank=24), False),
    ):
        module = config.build(spec, dtype=torch.float64)
        with torch.no_grad():
            module.convert_from(weights)
        expected = dense_attention(weights, x, spec)
        assert torch.allclose(module(x), expected, rtol=1e-9, atol=1e-9) == exact


def test_tucker_keys_are_shared_by_all_heads():
    module = vt.TuckerConfig(ranks=(4, 8, 6)).build(make_spec())
    assert module.k_proj.out_features == module.v_proj.out_features == 6
    assert module.pre_core.shape == (4, 8, 6)
    assert "ranks=(4, 8, 6)" in repr(module)
