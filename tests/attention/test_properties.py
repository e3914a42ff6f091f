"""Conversions of dense layers of any shape, with any biases, at any ranks, in any precision."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vit_tucker as vt
from tests.reference import dense_attention, make_spec, make_weights
from vit_tucker.attention.variants.tucker.ranks import full_ranks

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
SHAPES = {
    "heads": st.integers(1, 6),
    "width": st.integers(2, 8),
    "channels": st.integers(4, 24),
    "out": st.integers(4, 24),
    "qkv_bias": st.booleans(),
    "proj_bias": st.booleans(),
    "seed": st.integers(0, 100),
}


def host(heads, width, channels, out, qkv_bias, proj_bias, seed):
    """Spec, float64 weights and tokens."""
    spec = make_spec(
        embed_dim=channels, num_heads=heads, head_dim=width, out_dim=out, qkv_bias=qkv_bias, proj_bias=proj_bias
    )
    x = torch.randn(4, 16, channels, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return spec, make_weights(spec, seed), x


def convert(config, spec, weights):
    module = config.build(spec, dtype=torch.float64).eval()
    with torch.no_grad():
        module.convert_from(weights)
    return module


def relative(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(dtype=DTYPES, **SHAPES)
def test_full_rank_is_as_good_as_the_host_in_its_precision(dtype, **shape):
    """Our error at most twice that of the dense formula in the same precision, both against float64."""
    spec, weights, x = host(**shape)
    truth = dense_attention(weights, x, spec)
    low = type(weights)(**{k: v.to(dtype) for k, v in vars(weights).items() if v is not None})
    reference = relative(dense_attention(low, x.to(dtype), spec), truth)
    module = convert(vt.TuckerConfig.full_rank(spec), spec, weights).to(dtype)
    floor = (
        4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-10
    )  # lucky references; Grams square in the HOSVD
    assert relative(module(x.to(dtype)), truth) <= 2 * reference + floor
    pre, post = full_ranks(spec)
    rank = min(shape["out"], shape["heads"] * min(shape["width"], shape["channels"]))  # of the output mode
    if rank > 1:
        smaller = convert(vt.TuckerConfig(ranks=pre, post_ranks=(post[0], rank - 1, post[2])), spec, weights)
        assert relative(smaller(x), truth) > 1e-6  # one output rank less must not match


@settings(max_examples=60, deadline=None, derandomize=True)
@given(dtype=DTYPES, data=st.data(), **SHAPES)
def test_any_ranks_in_any_precision(dtype, data, **shape):
    """The layer in low precision is near its float64 twin, and has the parameters that the formula says."""
    spec, weights, x = host(**shape)
    pre, post = (tuple(data.draw(st.integers(1, limit)) for limit in full) for full in full_ranks(spec))
    module = convert(vt.TuckerConfig(ranks=pre, post_ranks=post), spec, weights)
    truth = module(x)
    low = copy.deepcopy(module).to(dtype)
    assert relative(low(x.to(dtype)), truth) <= 16 * torch.finfo(dtype).eps  # about ten products in a row, rounded
    assert (
        sum(p.numel() for p in module.parameters())
        == vt.TuckerConfig(ranks=pre, post_ranks=post).count_parameters(spec).total
    )
