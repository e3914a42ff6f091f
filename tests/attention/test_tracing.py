"""torch.compile with open numbers, and torch.fx: one graph and no compilation for each batch size, as the hosts have it."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import vit_tucker as vt
from tests.attention.backends.test_backends import CUDA, tensors
from tests.reference import all_configs, make_spec, randomise, rope_of
from vit_tucker.attention.backends import choose, flash, get_backend, recorded_choices
from vit_tucker.attention.rope import RopeSpec

pytestmark = pytest.mark.slow

TOKENS = 9
MASK = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
SPECS = {
    "in training": make_spec(attn_drop=0.1, proj_drop=0.1),
    "rope": make_spec(head_dim=10, rope=RopeSpec(1)),
    "wide heads": make_spec(head_dim=10),
}
CALLS = {"in training": {}, "rope": {"attn_mask": MASK}, "wide heads": {"is_causal": True}}
COMPILED = {"in training": ("mla", "tucker"), "rope": ("gqa", "mha", "mla", "tucker"), "wide heads": ("gqa", "tucker")}
"""Methods that are compiled with each: all of them rotate; dropout is the same code for all heads, and causal order is."""


class Layers(nn.Module):
    """Side by side, so that one compilation sees them all: every method, and Tucker Attention as a whole."""

    def __init__(self, spec, methods=("gqa", "mha", "mla", "tucker")):
        super().__init__()
        configs = [config for config in all_configs(spec)[1::2] if config.method in methods]
        configs.append(vt.TuckerConfig(ranks=(2, 16, 16), shared_kv=True))
        self.layers = nn.ModuleList(randomise(config.build(spec, dtype=torch.float64)) for config in configs)

    def forward(self, x, **options):
        return torch.stack([layer(x, **options) for layer in self.layers])


def images(count):
    return torch.randn(count, TOKENS, 24, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


@pytest.mark.parametrize("spec", SPECS)
def test_open_numbers_give_one_graph_for_all_batch_sizes(spec):
    torch._dynamo.reset()
    layers = Layers(SPECS[spec], COMPILED[spec]).train(spec == "in training")
    given = CALLS[spec] | rope_of(SPECS[spec], TOKENS)
    counter = CompileCounter()
    compiled = torch.compile(layers, backend=counter, dynamic=True, fullgraph=True)
    for count in (2, 3, 5):
        results = []
        for call in (compiled, layers):
            torch.manual_seed(0)
            x = images(count).requires_grad_()
            y = call(x, **given)
            results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


def test_what_changes_the_choice_of_a_backend_compiles_anew():
    torch._dynamo.reset()
    layer, counter = vt.TuckerConfig(ranks=(2, 16, 16)).build(make_spec(), dtype=torch.float64).eval(), CompileCounter()
    compiled = torch.compile(layer, backend=counter, dynamic=True, fullgraph=True)
    expected = compiled(images(2))
    compiled(images(3))
    assert counter.frame_count == 1
    for count, (name, value) in enumerate({"backend": "eager", "fused_attn": False}.items(), start=2):
        setattr(layer, name, value)
        torch.testing.assert_close(compiled(images(2)), expected)
        assert counter.frame_count == count


def test_flash_attn_is_imported_once_outside_of_graphs(tmp_path, monkeypatch):
    """By a package that stands in for it, since it can't be built here."""
    (tmp_path / "flash_attn.py").write_text(
        "from torch.nn.functional import scaled_dot_product_attention as attention\n"
        "def flash_attn_func(q, k, v, dropout_p, softmax_scale, causal):\n"
        "    parts = [t.transpose(1, 2) for t in (q, k, v)]\n"
        "    return attention(*parts, scale=softmax_scale, is_causal=causal, enable_gqa=True).transpose(1, 2)\n"
    )
    (tmp_path / "flash_attn-2.8.3.dist-info").mkdir()
    (tmp_path / "flash_attn-2.8.3.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(flash, "flash_attn_func", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flash.missing.cache_clear()
    try:
        with recorded_choices():
            assert choose(CUDA, "flash_attn").name == "flash_attn"
            q, k, v = tensors(1, widths=(16, 16), dtype=torch.float32)
            options = (None, True, 0.3, 0.0)
            torch._dynamo.reset()
            compiled = torch.compile(get_backend("flash_attn").attend, backend="eager", dynamic=True, fullgraph=True)
            torch.testing.assert_close(compiled(q, k, v, *options), get_backend("sdpa").attend(q, k, v, *options))
    finally:
        flash.missing.cache_clear()


@pytest.mark.parametrize("spec", SPECS)
def test_fx_traces_the_fused_path(spec):
    """Without shapes, and with a place for a mask that may stay empty."""
    layers = Layers(SPECS[spec]).eval()
    table = rope_of(SPECS[spec], TOKENS).get("rope")

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x, attn_mask=None):
            return self.layers(x, attn_mask=attn_mask, rope=table)

    traced = torch.fx.symbolic_trace(Call())
    for count in (2, 5):
        for mask in (None, MASK):
            torch.testing.assert_close(traced(images(count), mask), layers(images(count), attn_mask=mask, rope=table))
    assert not torch.allclose(traced(images(2), MASK), layers(images(2), rope=table))
