"""Caches, masks and generation of patched decoders: with a cache, whatever its class, the tokens are those without one."""

import copy
import pickle

import pytest
import torch

import vit_tucker as vt
from tests.hosts.decoders import LATENT, attention_of, make_decoder, patched, small, tokens
from vit_tucker.patching.full_rank import full_rank_config

transformers = pytest.importorskip("transformers")
from transformers import DynamicCache, StaticCache  # noqa: E402

CONFIGS = {
    "tucker": vt.TuckerConfig(ranks=(4, 16, 8), post_ranks=(4, 16, 6)),
    "shared": vt.TuckerConfig(ranks=(3, 16, 8), shared_kv=True),
    "mla": vt.MLAConfig(q_lora_rank=12, kv_lora_rank=8),
    "mla two latents": vt.MLAConfig(q_lora_rank=12, kv_lora_rank=8, shared_kv=False),
    "gqa": vt.GQAConfig(num_kv_heads=1),
    "mha": vt.MHAConfig(),
}
X = torch.randn(1, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CELLS = [(name, method) for name in LATENT for method in CONFIGS] + [("qwen3", "gqa"), ("smollm3", "tucker")]


def without_cache(model, prompt, steps):
    """Greedy continuation, each token from the whole sequence."""
    for _ in range(steps):
        logits = model(prompt, attention_mask=torch.ones_like(prompt), use_cache=False).logits
        prompt = torch.cat([prompt, logits[:, -1:].argmax(-1)], 1)
    return prompt


def generate(model, prompt, steps, **options):
    mask = options.pop("attention_mask", torch.ones_like(prompt))
    return model.generate(prompt, attention_mask=mask, max_new_tokens=steps, do_sample=False, **options)


@pytest.mark.parametrize(("name", "method"), CELLS)
def test_tokens_with_a_cache_are_those_without(name, method):
    model = patched(name, CONFIGS[method])
    prompt = tokens(2, 5)
    expected = without_cache(model, prompt, 24)
    logits = model(expected).logits[:, 4:-1]
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        out = generate(model, prompt, 24, return_dict_in_generate=True, output_logits=True, **options)
        assert torch.equal(out.sequences, expected)
        assert (torch.stack(out.logits, 1) - logits).abs().max() < 1e-5  # norms compute in float32


@pytest.mark.parametrize("name", LATENT)
def test_64_steps(name):
    model = patched(name)
    prompt = tokens(1, 3, seed=1)
    assert torch.equal(generate(model, prompt, 64), without_cache(model, prompt, 64))


@pytest.mark.parametrize("name", LATENT)
def test_a_cache_that_is_not_updated_gives_other_tokens(name, monkeypatch):
    model = patched(name)
    x = tokens(1, 9)
    logits = model(x).logits[:, -1]
    for update, fits in ((DynamicCache.update, True), (lambda self, k, v, *args, **kwargs: (k, v), False)):
        monkeypatch.setattr(DynamicCache, "update", update)
        cache = DynamicCache()
        model(x[:, :-1], past_key_values=cache)
        step = model(x[:, -1:], past_key_values=cache, position_ids=torch.tensor([[8]])).logits[:, -1]
        assert ((step - logits).abs().max() < 1e-5) == fits


@pytest.mark.parametrize("name", LATENT)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_left_padding_is_as_each_alone(name, implementation):
    model = patched(name, dtype=torch.float32, attn_implementation=implementation)  # eager softmax is float32's
    lengths = (3, 7, 12)
    rows = [tokens(1, n, seed=n) for n in lengths]
    batch = torch.cat([torch.nn.functional.pad(row, (12 - row.shape[1], 0)) for row in rows])
    mask = (batch != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = model(batch, attention_mask=mask, position_ids=positions).logits
    for row, out, length in zip(rows, logits, lengths, strict=True):
        assert (model(row).logits[0] - out[-length:]).abs().max() < 1e-5
    assert torch.isfinite(logits).all()
    together = generate(model, batch, 12, attention_mask=mask)
    for row, out in zip(rows, together, strict=True):
        assert torch.equal(generate(model, row, 12)[0, -12:], out[-12:])


@pytest.mark.parametrize("name", LATENT)
def test_beams_chunks_crops_and_continuations(name):
    model = patched(name)
    prompt = tokens(2, 9)
    beams = generate(model, prompt, 12, num_beams=4)
    assert torch.equal(beams, generate(model, prompt, 12, num_beams=4, use_cache=False))
    expected = without_cache(model, prompt[:1], 16)
    assert torch.equal(generate(model, prompt[:1], 16, prefill_chunk_size=4), expected)
    cache = DynamicCache(config=model.config)
    first = generate(model, prompt[:1], 8, past_key_values=cache)
    assert torch.equal(generate(model, first, 8, past_key_values=cache), expected)
    if name != "mistral":  # sliding caches forget
        cache.crop(-5)
        assert torch.equal(generate(model, expected[:, :21], 4, past_key_values=cache), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_assisted_decoding_is_greedy_decoding(name):
    model, assistant = patched(name), patched(name, vt.TuckerConfig(ranks=(4, 16, 6)))
    prompt = tokens(1, 6)
    assert torch.equal(generate(model, prompt, 16, assistant_model=assistant), without_cache(model, prompt, 16))


def test_sampling_follows_its_seed_with_and_without_a_cache():
    model = patched("llama")
    outputs = []
    for cached in (True, False):
        torch.manual_seed(0)
        outputs.append(model.generate(tokens(1, 5), max_new_tokens=12, do_sample=True, top_k=20, use_cache=cached))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_offloaded_caches(name, monkeypatch):
    class Stream:
        def wait_stream(self, other):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def record_event(self, *args):
            return None

    monkeypatch.setattr(torch, "Stream", lambda *args, **kwargs: Stream())
    monkeypatch.setattr(torch.cuda, "Stream", lambda *args, **kwargs: Stream())
    monkeypatch.setattr(torch.cuda, "default_stream", lambda *args: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    model = patched(name)
    prompt = tokens(1, 5)
    cache = DynamicCache(config=model.config, offloading=True)
    assert torch.equal(generate(model, prompt, 12, past_key_values=cache), without_cache(model, prompt, 12))


@pytest.mark.parametrize(
    ("name", "config", "width"),
    [
        ("llama", CONFIGS["tucker"], 8 + 6),
        ("llama", CONFIGS["mla"], 8 + 8),  # a latent that rotates is kept twice
        ("gpt2", CONFIGS["tucker"], 8 + 6),
        ("gpt2", CONFIGS["mla"], 8),
        ("gpt2", CONFIGS["mla two latents"], 16),
        ("gpt2", CONFIGS["shared"], 8),
        ("llama", CONFIGS["gqa"], 2 * 6),
        ("llama", None, None),
    ],
    ids=lambda value: str(getattr(value, "method", value)),
)
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_bytes_of_a_cache(name, config, width, kind):
    model = make_decoder(name, torch.float32)
    if config is not None:
        vt.patch(model, config)
    else:
        width = 2 * 2 * 6  # the host's own: two key/value heads
    options = {"max_cache_len": 10} if kind is StaticCache else {}
    cache = kind(config=model.config, **options)
    model(tokens(3, 10), past_key_values=cache)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == 2 * 3 * 10 * width * 4  # layers, sequences, tokens, numbers, bytes
    if config is not None:
        assert attention_of(model).kv_width == width


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_implementations_agree(name):
    model = patched(name, dtype=torch.float32)
    x, outputs = tokens(2, 13), {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        outputs[implementation] = model(x).logits
    for logits in outputs.values():
        assert (logits - outputs["sdpa"]).abs().max() < 1e-5


@pytest.mark.parametrize(("name", "window"), [("mistral", 8), ("qwen2", None), ("llama", None), ("gpt2", None)])
def test_other_attention_functions_get_what_the_host_hands_them(name, window):
    seen = []

    def spy(module, query, key, value, mask, **kwargs):
        seen.append(kwargs)
        return query.transpose(1, 2)[..., : value.shape[-1]], None

    transformers.AttentionInterface.register("spy", spy)
    model = make_decoder(name)
    given = {"position_embeddings": model.model.rotary_emb(X, torch.arange(5)[None])} if name != "gpt2" else {}
    model.config._attn_implementation = "spy"
    attention_of(model)(X, attention_mask=None, **given)
    vt.patch(model, vt.MHAConfig())
    attention_of(model)(X, attention_mask=None, **given)
    dense, ours = seen
    assert {key: value for key, value in dense.items() if value is not None} == ours
    assert ours.get("sliding_window") == window


@pytest.mark.slow
def test_flex_attention_agrees():
    model = patched("llama", dtype=torch.float32).requires_grad_(False)  # on the CPU it has no backward pass
    logits = model(tokens(1, 13)).logits
    model.set_attn_implementation("flex_attention")
    assert (model(tokens(1, 13)).logits - logits).abs().max() < 1e-5


@pytest.mark.parametrize("name", LATENT)
@pytest.mark.parametrize("before", [False, True], ids=["first call patched", "first call dense"])
def test_attention_maps_are_recorded(name, before):
    model = make_decoder(name, attn_implementation="eager")
    if before:  # transformers sets up its recording at the first call
        dense = model(tokens(1, 7), output_attentions=True).attentions
    vt.patch(model, full_rank_config(model, "tucker"))
    maps = model(tokens(1, 7), output_attentions=True).attentions
    assert [m.shape for m in maps] == [(1, 4, 7, 7)] * 2
    assert (maps[0].sum(-1) - 1).abs().max() < 1e-6
    vt.unpatch(model)
    again = model(tokens(1, 7), output_attentions=True).attentions
    assert len(again) == 2
    if before:
        assert all((a - b).abs().max() < 1e-6 for a, b in zip(maps, dense, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(again, dense, strict=True))


def test_a_patch_reports_no_hooks_of_transformers():
    model = make_decoder("llama", attn_implementation="eager")
    model(tokens(1, 4), output_attentions=True)
    report = vt.patch(model, small("llama"))
    assert not any("not carried over" in note for note in report.notes)


@pytest.mark.parametrize("name", LATENT)
def test_gradient_checkpointing_gives_equal_gradients(name):
    gradients = []
    for checkpointing in (False, True):
        model = patched(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        x = tokens(2, 9)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(x, labels=x).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)
    assert attention_of(model).k_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", LATENT)
def test_copies_and_pickles(name):
    model = patched(name)
    logits = model(tokens(1, 6)).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens(1, 6)).logits, logits)
        assert type(attention_of(other)) is type(attention_of(model))
        with torch.no_grad():
            attention_of(other).k_proj.weight.zero_()
    assert torch.equal(model(tokens(1, 6)).logits, logits)


def test_a_cache_under_an_unknown_name_is_refused():
    layer = attention_of(patched("gpt2"))
    x = torch.zeros(1, 2, 24, dtype=torch.float64)
    with pytest.raises(vt.PatchError, match="'past_key_value_states' may be a cache"):
        layer(x, past_key_value_states=DynamicCache())
    for known in ("cache", "past_key_values"):
        cache = DynamicCache()
        layer(x, **{known: cache})
        assert cache.get_seq_length() == 2


def test_a_method_without_keys_of_its_own_is_refused():
    class Sealed(vt.AttentionModule):
        def init_weights(self):
            pass

        def convert_from(self, weights):
            pass

        pre_pairs = post_pairs = None

    from vit_tucker.hosts.families import read_host
    from vit_tucker.hosts.transformers_layers import install

    module = attention_of(make_decoder("llama"))
    with pytest.raises(vt.PatchError, match=r"Sealed has no project\(\)"):
        install(Sealed(read_host(module).spec), module)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_decode_step_compiles_as_one_graph(name):
    model = patched(name, dtype=torch.float32)
    prompt = tokens(1, 5)
    expected = generate(model, prompt, 64)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(model.forward, fullgraph=True, backend=counter)
    cache = StaticCache(config=model.config, max_cache_len=80)
    with torch.no_grad():
        logits = model(prompt, past_key_values=cache, use_cache=True).logits
        ids, positions = [], torch.arange(5, 69)
        for position in positions:
            ids.append(logits[:, -1:].argmax(-1))
            given = {"position_ids": position[None, None]}
            logits = step(ids[-1], past_key_values=cache, use_cache=True, **given).logits
    assert torch.equal(torch.cat(ids, 1), expected[:, 5:])
    assert counter.frame_count <= 2
