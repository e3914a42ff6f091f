"""The two forms in which MLA is computed: alike in outputs and gradients, and chosen by what they cost."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vit_tucker as vt
from tests.contract.test_layer_contract import SPECS, rope_of
from tests.reference import randomise
from vit_tucker.attention.variants.mla.ranks import absorbing_saves

SPEC = vt.HostSpec(32, 2, 16, 32)


def results(layer, x, absorbed, **given):
    layer.absorbs = lambda tokens: absorbed
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x, **given)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"y": y, "x": x.grad, **{name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("spec", ["timm", "no biases", "other output width", "rope", "rope half"])
@pytest.mark.parametrize("shared_kv", [True, False])
@pytest.mark.parametrize("rank", [2, 6, 10])
def test_both_forms_are_the_same_layer(spec, shared_kv, rank):
    torch.manual_seed(0)
    config = vt.MLAConfig(q_lora_rank=5, kv_lora_rank=rank, shared_kv=shared_kv)
    layer = randomise(config.build(SPECS[spec], dtype=torch.float64))
    x = torch.randn(3, 9, SPECS[spec].embed_dim, dtype=torch.float64)
    expanded, absorbed = (results(layer, x, form, **rope_of(SPECS[spec])) for form in (False, True))
    assert expanded.keys() == absorbed.keys()
    for name, expected in expanded.items():
        torch.testing.assert_close(absorbed[name], expected)
    other = results(layer, x + 0.01, True, **rope_of(SPECS[spec]))
    assert not torch.allclose(other["y"], absorbed["y"])


def products(layer, x, absorbed):
    layer.absorbs = lambda tokens: absorbed
    layer.fused_attn = False  # widths as they are
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("tokens", [2, 5, 40])
@pytest.mark.parametrize("rank", [4, 16, 20])
def test_the_form_is_the_one_with_fewer_products(images, tokens, rank):
    """By torch's own counter of both; folding a bias costs a product with a vector, which the choice leaves out."""
    config = vt.MLAConfig(q_lora_rank=5, kv_lora_rank=rank)
    layer, x = config.build(vt.HostSpec(32, 2, 16, 32, qkv_bias=False)), torch.randn(images, tokens, 32)
    expanded, absorbed = (products(layer, x, form) for form in (False, True))
    assert absorbing_saves(layer.spec, 5, rank, images, tokens) == (absorbed < expanded)
    if images == 1:
        assert config.count_flops(layer.spec, tokens) == min(absorbed, expanded)


def test_choices_of_form_by_hand():
    """A ViT-B/16 with a latent as wide as a head: worth it for a batch, not for one image; a wide one never."""
    spec = vt.HostSpec(768, 12, 64, 768)
    assert absorbing_saves(spec, 128, 64, 8, 197)
    assert not absorbing_saves(spec, 128, 64, 1, 197)
    assert absorbing_saves(spec, 128, 16, 1, 197)
    assert not absorbing_saves(spec, 128, 128, 64, 197)


def test_norms_of_heads_forbid_absorption_and_open_shapes_count_as_large(monkeypatch):
    norms = {"qk_norm": {"q_norm": torch.nn.LayerNorm(16), "k_norm": torch.nn.LayerNorm(16)}}
    many, one = torch.randn(8, 50, 32), torch.randn(1, 3, 32)
    narrow, wide = (vt.MLAConfig(q_lora_rank=5, kv_lora_rank=rank) for rank in (2, 16))
    normed = narrow.build(vt.HostSpec(32, 2, 16, 32, extras=norms))
    assert narrow.build(SPEC).absorbs(many)
    assert not normed.absorbs(many)
    assert not wide.build(SPEC).absorbs(one)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert wide.build(SPEC).absorbs(one)
    assert not normed.absorbs(many)
