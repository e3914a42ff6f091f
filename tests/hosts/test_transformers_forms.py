"""Special cases, configs and counts of layers in decoders: each stands in the other's place, caches included."""

import pickle

import pytest
import torch

import vit_tucker as vt
from tests.hosts.decoders import attention_of, make_decoder, patched, small, tokens
from vit_tucker.analysis.kv_cache import count_kv_entries
from vit_tucker.errors import PatchError

METHODS = {
    "tucker": small("llama"),
    "gqa": vt.GQAConfig(num_kv_heads=1),
    "mla": vt.MLAConfig(kv_lora_rank=8, q_lora_rank=8),
    "mha": vt.MHAConfig(),
}
IDS = tokens(2, 12)


def blocks_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def replace_all(model, convert) -> None:
    for block in blocks_of(model):
        name = "attn" if hasattr(block, "attn") else "self_attn"
        setattr(block, name, convert(getattr(block, name)))


def generated(model):
    return model.generate(IDS, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_tucker_stands_in_the_place_of_every_method(name, method):
    model = patched(name, METHODS[method])
    expected = generated(model)
    replace_all(model, vt.to_tucker)
    assert isinstance(attention_of(model), type(attention_of(patched(name))))
    found = generated(model)
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    again = pickle.loads(pickle.dumps(attention_of(model)))
    assert type(again) is type(attention_of(model))


def test_maps_are_recorded_of_a_layer_in_anothers_place():
    """transformers sets up once what records them, here before the layers change."""
    model = patched("llama", METHODS["gqa"])
    model.set_attn_implementation("eager")
    before = model(IDS, output_attentions=True).attentions
    replace_all(model, vt.to_tucker)
    after = model(IDS, output_attentions=True).attentions
    assert len(before) == len(after) == 2
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["gqa", "mla", "mha"])
def test_mha_stands_in_their_place_without_rope(method):
    model = patched("gpt2", METHODS[method])
    expected = generated(model)
    replace_all(model, vt.to_mha)
    assert torch.equal(generated(model).sequences, expected.sequences)


def test_with_rope_only_tucker_is_a_form_of_all():
    layer = attention_of(patched("llama"))
    for convert in (vt.to_mha, vt.to_dense):
        with pytest.raises(PatchError, match="RoPE is not bilinear"):
            convert(layer)


def test_norms_of_queries_are_refused():
    with pytest.raises(PatchError, match="qk_norm is not bilinear"):
        vt.to_tucker(attention_of(patched("qwen3", METHODS["gqa"])))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_entries_counted_are_those_of_the_cache(name, method):
    """Of a text as long as the model's positions; the cache of a shorter one grows by the token."""
    model = patched(name, METHODS[method])
    assert vt.config_of(model) == METHODS[method]
    with torch.no_grad():
        past = model(IDS, use_cache=True).past_key_values
    entries = sum(layer.keys.numel() + layer.values.numel() for layer in past.layers)
    positions = model.config.max_position_embeddings
    assert entries * positions == count_kv_entries(model) * IDS.numel()


def test_entries_of_a_dense_host_are_those_of_its_key_value_heads():
    assert count_kv_entries(make_decoder("llama")) * 2 == count_kv_entries(make_decoder("gpt2")) == 2 * 2 * 24 * 256


@pytest.mark.parametrize(("rank", "is_exact"), [(12, True), (10, False)])
def test_a_latent_key_as_wide_as_the_hosts_key_value_heads_is_exact_and_the_report_says_so(rank, is_exact):
    model = make_decoder("llama")
    expected = model(IDS).logits
    report = vt.patch(model, vt.TuckerConfig(ranks=(4, 24, rank), post_ranks=(4, 24, 12)))
    assert torch.allclose(model(IDS).logits, expected, rtol=1e-5, atol=1e-5) == is_exact
    assert ("exact from width 12 on" in str(report)) != is_exact
    assert ("keep their rotations exactly" in str(report)) == is_exact
