"""Attention of transformers: what is read, exact at full rank, and what is refused and why."""

import pytest
import timm
import torch

import vit_tucker as vt
from tests.hosts.decoders import DECODERS, LATENT, attention_of, make_decoder, patched, tokens
from vit_tucker.hosts.families import read_host
from vit_tucker.hosts.find import find_attention, find_other_attention
from vit_tucker.patching.full_rank import full_rank_config

transformers = pytest.importorskip("transformers")

METHODS = {name: ("gqa", "mha", "mla", "tucker") if name in (*LATENT, "granite", "smollm3", "starcoder2") else ("gqa", "mha")
           for name in DECODERS}  # fmt: skip
PAIRS = [(name, method) for name, methods in METHODS.items() for method in methods]


def attend(model, x):
    """The first attention layer's output, by itself: its model's norms compute in float32."""
    layer, N = attention_of(model), x.shape[1]
    given = {"attention_mask": torch.ones(N, N, dtype=torch.bool).tril()[None, None]}
    if hasattr(model, "model"):
        given["position_embeddings"] = model.model.rotary_emb(x, torch.arange(N)[None])
    return layer(x, **given)[0]


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_full_rank_is_exact(name, method):
    model = make_decoder(name)
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    expected, logits = attend(model, x), model(tokens(2, 12)).logits
    vt.patch(model, full_rank_config(model, method))
    assert (attend(model, x) - expected).abs().max() < 1e-12
    assert (model(tokens(2, 12)).logits - logits).abs().max() < (
        1e-10 if name == "gpt2" else 1e-5
    )  # RMSNorm is float32
    assert expected.std() > 0.05  # there is something to be equal to


def test_full_rank_is_that_of_the_hosts_key_heads():
    model = make_decoder("llama")
    assert full_rank_config(model, "tucker").ranks == (4, 24, 2 * 6)
    assert full_rank_config(model, "mla").kv_lora_rank == 2 * 6
    assert full_rank_config(model, "gqa").num_kv_heads == 2
    with pytest.raises(vt.PatchError, match="key/value rank 14 is above its full rank 12"):
        vt.plan(model, vt.TuckerConfig(ranks=(4, 24, 14), post_ranks=(4, 24, 12)))
    assert vt.plan(model, vt.TuckerConfig(ranks=(4, 24, 14), shared_kv=True))  # room for keys and values


@pytest.mark.parametrize("name", LATENT)
def test_below_full_rank_is_not(name):
    model = make_decoder(name)
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    expected = attend(model, x)
    vt.patch(model, vt.TuckerConfig(ranks=(4, 16, 8), post_ranks=(4, 16, 6)))
    assert (attend(model, x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", LATENT)
def test_float32_is_exact_to_its_rounding(name):
    model = make_decoder(name, torch.float32)
    logits = model(tokens(2, 12)).logits
    vt.patch(model, full_rank_config(model, "tucker"))
    assert (model(tokens(2, 12)).logits - logits).abs().max() < 5e-5


def test_a_key_bias_counts_where_keys_rotate():
    model = make_decoder("qwen2")
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    vt.patch(model, full_rank_config(model, "tucker"))
    before = attend(model, x)
    attention_of(model).k_proj.bias.data.zero_()
    assert (attend(model, x) - before).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["tucker", "mla"])
def test_norms_of_heads_are_refused_for_methods_without_heads_keys(method):
    model = make_decoder("qwen3")
    host = read_host(attention_of(model))
    config = vt.TuckerConfig(ranks=(4, 8, 8)) if method == "tucker" else vt.MLAConfig(q_lora_rank=8, kv_lora_rank=8)
    with pytest.raises(vt.PatchError, match=r"model.layers.0.self_attn: .*normalised"):
        vt.patch(model, config)
    assert "qk_norm" in host.spec.extras
    assert isinstance(attention_of(model), transformers.models.qwen3.modeling_qwen3.Qwen3Attention)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("Gemma2", "softcap"),
        ("GptOss", "sink"),
        ("Helium", "rotation .RoPE. is not LLaMA's: apply_rotary_pos_emb differs"),
        ("Olmo2", "its forward is not LLaMA's: `query_states = self.q_norm"),
        ("HunYuanDenseV1", "its forward is not LLaMA's"),
        ("BertLMHead", "its attention function is called as"),
    ],
)
def test_other_attention_is_refused_with_its_difference(kind, reason):
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 61,
             "num_hidden_layers": 1, "intermediate_size": 32, "pad_token_id": 0}  # fmt: skip
    config = getattr(transformers, f"{kind.removesuffix('LMHead')}Config")(**sizes)
    with torch.device("meta"):
        cls = getattr(transformers, f"{kind}ForCausalLM" if not kind.endswith("Head") else f"{kind}Model")
        model = cls(config)
    name, module = next(iter(find_attention(model).items()))
    with pytest.raises(vt.PatchError, match=reason):
        vt.plan(model, vt.GQAConfig(num_kv_heads=1))
    assert "Attention" in type(module).__name__, name


def test_cross_attention_stays_and_is_refused_by_name():
    model = make_decoder("gpt2", add_cross_attention=True)
    assert find_other_attention(model) == ["transformer.h.0.crossattention", "transformer.h.1.crossattention"]
    with pytest.raises(vt.PatchError, match="another sequence"):
        read_host(model.transformer.h[0].crossattention)
    report = vt.patch(model, vt.TuckerConfig(ranks=(2, 8, 8)))
    assert len(report.layers) == 2
    with pytest.raises(vt.PatchError, match="cross-attention"):
        attention_of(model)(torch.zeros(1, 2, 24, dtype=torch.float64), encoder_hidden_states=torch.zeros(1, 2, 24))


def test_a_subclass_of_a_user_is_refused():
    model = make_decoder("llama")

    class Mine(type(attention_of(model))):
        pass

    attention_of(model).__class__ = Mine
    with pytest.raises(vt.PatchError, match="unknown attention class"):
        vt.patch(model, vt.GQAConfig(num_kv_heads=1))


def test_a_replaced_forward_is_refused():
    model = make_decoder("llama")
    attention_of(model).forward = lambda *args, **kwargs: None
    with pytest.raises(vt.PatchError, match="forward"):
        vt.patch(model, vt.GQAConfig(num_kv_heads=1))


def test_parameters_and_operations_are_counted():
    model = make_decoder("llama")
    report = vt.plan(model, vt.TuckerConfig(ranks=(4, 16, 8)))
    row = report.layers[0]
    assert row.params_before.weights == sum(p.numel() for p in attention_of(model).parameters())
    vt.patch(model, vt.TuckerConfig(ranks=(4, 16, 8)))
    assert row.params_after.total == sum(p.numel() for p in attention_of(model).parameters())
    spec = read_host(make_decoder("llama").model.layers[0].self_attn).spec
    assert row.flops_after == vt.TuckerConfig(ranks=(4, 16, 8)).count_flops(spec, 256)  # as many tokens as it takes
    assert row.flops_before == vt.GQAConfig(num_kv_heads=2).count_flops(spec, 256)


def test_reports_have_a_column_of_the_cache_where_there_is_one():
    report = vt.plan(make_decoder("llama"), vt.TuckerConfig(ranks=(4, 16, 8), post_ranks=(4, 16, 6)))
    assert (report.layers[0].cached_before, report.layers[0].cached_after) == (2 * 2 * 6, 8 + 6)
    assert (report.cached_before, report.cached_after) == (48, 28)
    assert "24 -> 14 (58%)" in str(report)
    assert "MFLOPs/256 tokens" in str(report)
    assert "KV cache/token 48 -> 28 (58%)" in report.summary()
    assert report.to_dict()["layers"][0]["cached_after"] == 14
    vit = vt.plan(timm.create_model("vit_tiny_patch16_224", depth=1), vt.TuckerConfig(ranks=(3, 8, 8)))
    assert "cache" not in str(vit) + str(vit.to_dict())


def test_the_report_says_for_which_lengths_folded_rotations_hold():
    config = {"ranks": (4, 16, 8), "post_ranks": (4, 16, 6)}
    batches = [tokens(4, 30, seed=seed) for seed in range(4)]
    notes = "\n".join(vt.patch(make_decoder("llama"), "tucker", **config, calibration=batches).notes)
    assert "rotations that sequences of 30 tokens can't tell apart" in notes
    unfolded = vt.TuckerConfig(**config, calibration=vt.Calibration(fold_rotations=False))
    for model, method in ((make_decoder("llama"), unfolded), (make_decoder("gpt2"), vt.TuckerConfig(**config))):
        assert "can't tell apart" not in "\n".join(vt.patch(model, method, calibration=batches).notes)
    few = "\n".join(vt.patch(make_decoder("llama"), "tucker", **config, calibration=[tokens(1, 18)]).notes)
    assert "18 tokens of 1 sequence for 24 columns" in few


@pytest.mark.parametrize("name", LATENT)
def test_unpatch_gives_back_the_very_modules(name):
    model = make_decoder(name)
    module, logits = attention_of(model), model(tokens(2, 12)).logits
    state = dict(module.named_parameters())
    vt.patch(model, vt.TuckerConfig(ranks=(2, 8, 8)))
    vt.unpatch(model)
    assert attention_of(model) is module
    assert all(parameter is state[key] for key, parameter in module.named_parameters())
    assert torch.equal(model(tokens(2, 12)).logits, logits)
    assert "save_pretrained" not in vars(model)


def test_ways_of_transformers_that_are_wrong_for_a_patched_model_are_refused(tmp_path):
    model = patched("llama")
    with pytest.raises(vt.PatchError, match=r"vit_tucker.save"):
        model.save_pretrained(tmp_path / "folder")
    with pytest.raises(vt.PatchError, match="paged caches"):
        model.generate_batch([[1, 2]])
    assert not (tmp_path / "folder").exists()
