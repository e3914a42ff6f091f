"""Backends against the formula; the registry: what is chosen, what is refused, what the log says."""

import pytest
import torch
from torch.nn import functional as F

from vit_tucker.attention.backends import (
    Facts,
    get_backend,
    sdpa,
)
from vit_tucker.attention.backends.base import facts_of
from vit_tucker.attention.backends.heads import expand_heads, pack_heads, unpack_heads
from vit_tucker.attention.backends.padding import attend_padded, cpu_width, pad

CPU = Facts("cpu", torch.float32, 12, 1, 16, 16)
CUDA = CPU._replace(device="cuda", dtype=torch.bfloat16)
WHOLE = CPU._replace(ranks=(16, 16, 16, 16), grad=True)
GENERIC = ("sdpa", "blocked", "eager", "flex")


def tensors(kv_heads=1, heads=4, tokens=7, widths=(16, 24), dtype=torch.float64, batch=2):
    g = torch.Generator().manual_seed(heads + tokens)
    shapes = (
        (batch, heads, tokens, widths[0]),
        (batch, kv_heads, tokens, widths[0]),
        (batch, kv_heads, tokens, widths[1]),
    )
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def formula(q, k, v, scale=0.3, mask=None):
    scores = scale * q @ expand_heads(k, q.shape[1]).mT
    return (scores if mask is None else scores + mask).softmax(-1) @ expand_heads(v, q.shape[1])


def run(name, q, k, v, attn_mask=None, is_causal=False, dropout=0.0):
    facts = facts_of(q, k, v, attn_mask, is_causal, dropout)
    return attend_padded(get_backend(name), facts, q, k, v, attn_mask, is_causal, 0.3, dropout)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", GENERIC)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_outputs_and_gradients_are_those_of_the_formula(name, kv_heads):
    results = []
    for compute in (formula, lambda *args: run(name, *args)):
        inputs = [t.requires_grad_(name != "flex") for t in tensors(kv_heads)]  # flex has no backward pass on the CPU
        y = compute(*inputs)
        grads = torch.autograd.grad(y.square().sum(), inputs) if name != "flex" else ()
        results.append([y, *grads])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)  # float64, sums of a few dozen products
    assert not torch.allclose(results[1][0], formula(*tensors(kv_heads), scale=0.31))


BOOLEAN = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(0)) > 0.4
BOOLEAN |= torch.eye(7, dtype=torch.bool)
ADDITIVE = torch.linspace(-2, 2, 4 * 49, dtype=torch.float64).reshape(4, 7, 7)
TRIANGLE = torch.full((7, 7), float("-inf"), dtype=torch.float64).triu(1)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["sdpa", "eager", "flex"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_masks(name, kv_heads):
    q, k, v = tensors(kv_heads)
    additive = torch.zeros(2, 1, 7, 7, dtype=torch.float64).masked_fill(~BOOLEAN, float("-inf"))
    cases = (({"attn_mask": BOOLEAN}, additive), ({"attn_mask": ADDITIVE}, ADDITIVE), ({"is_causal": True}, TRIANGLE))
    for given, mask in cases:
        y = run(name, q, k, v, **given)
        torch.testing.assert_close(y, formula(q, k, v, mask=mask), rtol=1e-10, atol=1e-10)
        assert not torch.allclose(y, formula(q, k, v))


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_dropout(name):
    torch.manual_seed(0)
    first, second = (run(name, *tensors(), dropout=0.5) for _ in range(2))
    assert not torch.allclose(first, second)


def test_packing_is_a_view_of_what_a_projection_leaves_and_can_be_undone():
    x = torch.randn(2, 7, 4 * 6)
    q = x.unflatten(2, (4, 6)).transpose(1, 2)  # (B, H, N, D)
    packed = pack_heads(q, 1)
    assert packed.shape == (2, 1, 28, 6)
    assert packed.data_ptr() == x.data_ptr()
    for kv_heads in (1, 2, 4):
        assert torch.equal(unpack_heads(pack_heads(q, kv_heads), 4), q)
    assert torch.equal(pack_heads(q, 2)[:, 1, :2], q[:, 2:, 0])  # the first token's heads of the second group


def test_sdpa_leaves_no_thread_idle_in_training():
    q = torch.empty(1, 4, 7, 8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert not sdpa.packs(q, 1)
        assert sdpa.packs(q, 2)
        with torch.no_grad():
            assert sdpa.packs(q, 1)
        torch.set_num_threads(1)
        assert sdpa.packs(q, 1)
    finally:
        torch.set_num_threads(threads)


def test_fused_kernels_get_one_width_on_the_cpu(monkeypatch):
    """Where keys and values differ in width torch would compute in parts."""
    kernels = []
    attention = F.scaled_dot_product_attention

    def watched(q, k, v, **options):
        kernels.append(torch._fused_sdp_choice(q, k, v))
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for widths in ((16, 24), (24, 16), (16, 16), (3, 3), (5, 31)):
        q, k, v = tensors(widths=widths)
        y = run("sdpa", q, k, v)
        assert y.shape == (2, 4, 7, widths[1])
        torch.testing.assert_close(y, formula(q, k, v))
        assert torch._fused_sdp_choice(q, *(t.expand(-1, 4, -1, -1) for t in (k, v))) == (widths[0] == widths[1])
    assert kernels == [1] * 5  # SDPBackend.FLASH_ATTENTION


def test_widths_of_heads():
    """By hand: 16 at least, multiples of 4; what torch computes in parts anyway stays as it is, as do exports, and GPUs' widths
    are multiples of 8 where they differ."""
    assert [cpu_width(width) for width in (1, 15, 16, 17, 31, 64, 127)] == [16, 16, 16, 20, 32, 64, 128]
    facts = CPU._replace(key_width=5, value_width=31)
    assert sdpa.widths(facts) == (32, 32)
    assert sdpa.remark(facts) == "fused in torch, padded to 32 columns"
    assert sdpa.remark(CPU) == "fused in torch"
    assert sdpa.widths(facts._replace(own_only=True)) == (32, 32)  # two widths would be computed in parts
    assert sdpa.widths(facts._replace(value_width=5, own_only=True)) == (5, 5)
    assert sdpa.widths(facts._replace(value_width=5)) == (16, 16)
    assert sdpa.widths(facts._replace(value_width=5, kv_heads=12)) == (5, 5)
    assert sdpa.widths(facts._replace(dropout=0.1)) == (5, 31)
    assert sdpa.widths(facts._replace(mask_grad=True)) == (5, 31)
    assert sdpa.widths(CUDA._replace(key_width=5, value_width=31)) == (8, 32)
    assert sdpa.widths(CUDA._replace(key_width=5, value_width=5)) == (5, 5)


def test_padding():
    padded = pad(torch.ones(2, 3, 5, 13), 16)
    assert padded.shape[-1] == 16
    assert padded[..., 13:].abs().max() == 0
    x = torch.ones(2, 16)
    assert pad(x, 16) is x
