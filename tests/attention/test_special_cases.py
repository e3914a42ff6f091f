"""MHA, MQA, GQA and MLA as Tucker layers with the ranks of Thms B.2-B.4, and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vit_tucker as vt
from tests.reference import make_spec, randomise
from vit_tucker.tensor.mode_ranks import mode_ranks
from vit_tucker.tensor.tucker import hosvd

X = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
D, HEADS, C = 6, 4, 24
MLA_WIDE = vt.MLAConfig(q_lora_rank=8, kv_lora_rank=9)  # 4 heads x 9 >= 24: the output rank is d
MLA_NARROW = vt.MLAConfig(q_lora_rank=7, kv_lora_rank=5)  # 4 x 5 < 24: the realised output rank is H*cKV
LAYERS = {
    "mha": (vt.MHAConfig(), (HEADS, C, C), (HEADS, C, C)),
    "mqa": (vt.GQAConfig(num_kv_heads=1), (HEADS, C, D), (HEADS, C, D)),
    "gqa": (vt.GQAConfig(num_kv_heads=2), (HEADS, C, 2 * D), (HEADS, C, 2 * D)),
    "mla": (MLA_WIDE, (HEADS, 8, 9), (HEADS, C, 9)),
    "mla, narrow": (MLA_NARROW, (HEADS, 7, 5), (HEADS, 20, 5)),
    "mla, two latents": (vt.MLAConfig(q_lora_rank=8, kv_lora_rank=9, shared_kv=False), (HEADS, 8, 9), (HEADS, C, 9)),
    "tucker": (vt.TuckerConfig(ranks=(3, 8, 10), post_ranks=(2, 9, 7)), (3, 8, 10), (2, 9, 7)),
    "tucker, shared": (vt.TuckerConfig(ranks=(3, 8, 10), shared_kv=True), (3, 8, 10), (3, 8, 10)),
}


def build(config, seed=0, **spec):
    return randomise(config.build(make_spec(**spec), dtype=torch.float64), seed).eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_to_tucker_is_exact_with_the_theorems_ranks(name, bias):
    config, pre, post = LAYERS[name]
    layer = build(config, qkv_bias=bias, proj_bias=bias)
    tucker = vt.to_tucker(layer)
    torch.testing.assert_close(tucker(X), layer(X), rtol=1e-10, atol=1e-10)
    if bias and name.startswith("mla"):  # the query bias is one more coordinate beside the query latent
        pre = (pre[0], pre[1] + 1, pre[2])
    assert tucker.ranks == (pre, post)
    assert mode_ranks(layer.pre_pairs()) == pre
    assert mode_ranks(layer.post_pairs()) == post
    mask = torch.rand(9, 9, generator=torch.Generator().manual_seed(0)) > 0.3
    mask.fill_diagonal_(True)
    torch.testing.assert_close(tucker(X, attn_mask=mask), layer(X, attn_mask=mask), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("which", ["pre", "post"])
@pytest.mark.parametrize("name", LAYERS)
def test_one_rank_less_does_not_match(name, which, mode):
    layer = build(LAYERS[name][0])
    tucker = vt.to_tucker(layer)
    ranks = [list(r) for r in tucker.ranks]
    index = 0 if which == "pre" else 1
    ranks[index][mode] -= 1
    pairs = layer.pre_pairs(), layer.post_pairs()
    tensors = [hosvd(p, tuple(r)) for p, r in zip(pairs, ranks, strict=True)]
    smaller = vt.TuckerConfig(ranks=tuple(ranks[0]), post_ranks=tuple(ranks[1])).build(layer.spec, dtype=torch.float64)
    with torch.no_grad():
        smaller.eval().set_tensors(*tensors, layer.folded_out_bias())
    error = (smaller(X) - layer(X)).norm() / layer(X).norm()
    assert error > 1e-5, "a rank too small must be seen; exact conversions are at 1e-10"


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 4),
    width=st.integers(1, 5),
    channels=st.integers(2, 12),
    out=st.integers(2, 12),
    latents=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    qkv_bias=st.booleans(),
    proj_bias=st.booleans(),
    method=st.sampled_from(["mha", "gqa", "mqa", "mla", "mla2"]),
    seed=st.integers(0, 100),
)
def test_to_tucker_is_exact_for_any_shape(heads, width, channels, out, latents, qkv_bias, proj_bias, method, seed):
    spec = make_spec(
        embed_dim=channels, num_heads=heads, head_dim=width, out_dim=out, qkv_bias=qkv_bias, proj_bias=proj_bias
    )
    config = {
        "mha": vt.MHAConfig(),
        "gqa": vt.GQAConfig(num_kv_heads=max(g for g in (1, 2) if heads % g == 0)),
        "mqa": vt.GQAConfig(num_kv_heads=1),
        "mla": vt.MLAConfig(q_lora_rank=latents[0], kv_lora_rank=latents[1]),
        "mla2": vt.MLAConfig(q_lora_rank=latents[0], kv_lora_rank=latents[1], shared_kv=False),
    }[method]
    layer = randomise(config.build(spec, dtype=torch.float64), seed).eval()
    x = torch.randn(2, 5, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(vt.to_tucker(layer)(x), layer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_to_dense_gives_the_matrices_of_the_heads(name):
    layer = build(LAYERS[name][0])
    pre, post, bias = vt.to_dense(layer)
    ones = torch.cat([X, torch.ones_like(X[..., :1])], -1)
    scores = torch.einsum("bnc,hcd,bmd->bhnm", ones, pre, X) * layer.scale
    expected = torch.einsum("bhnm,bmc,hco->bno", scores.softmax(-1), X, post) + bias
    torch.testing.assert_close(layer(X), expected, rtol=1e-10, atol=1e-10)
    wrong = torch.einsum("bhnm,bmc,hco->bno", scores.softmax(-1), X, post)  # without the folded value biases
    assert not torch.allclose(layer(X), wrong, rtol=1e-3)


@pytest.mark.parametrize("name", ["mha", "mqa", "gqa", "mla", "mla, two latents"])
def test_to_mha_is_exact_where_heads_have_rank_head_dim(name):
    layer = build(LAYERS[name][0])
    mha = vt.to_mha(layer)
    torch.testing.assert_close(mha(X), layer(X), rtol=1e-10, atol=1e-10)
    back = vt.to_mha(vt.to_tucker(layer))  # through Tucker and back
    torch.testing.assert_close(back(X), layer(X), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        mha.qkv.weight[0] *= 1.01
    assert not torch.allclose(mha(X), layer(X), rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "spec"),
    [
        (m, {f"{s}_bias": False})
        for m in ("gqa", "mla", "tucker")
        for s in ("key", "qkv", "proj")
        if (m, s) != ("tucker", "proj")
    ],
)
def test_to_mha_finds_a_place_for_each_bias(method, spec):
    """Also where keys have none, as in EVA: queries and values have theirs beside the joint projection."""
    layer = build(
        {"gqa": vt.GQAConfig(num_kv_heads=2), "mla": MLA_NARROW, "tucker": vt.TuckerConfig(ranks=(3, 6, 6))}[method],
        **spec,
    )
    mha = vt.to_mha(layer)
    torch.testing.assert_close(mha(X), layer(X), rtol=1e-10, atol=1e-10)
    assert mha.state_dict().keys() == vt.MHAConfig().build(layer.spec).state_dict().keys()
    torch.testing.assert_close(vt.to_mha(mha)(X), mha(X), rtol=1e-12, atol=1e-12)


def test_to_mha_refuses_heads_of_larger_rank():
    with pytest.raises(vt.PatchError, match="pre-softmax matrix of head 0 has rank 8, dense heads have at most 6"):
        vt.to_mha(build(LAYERS["tucker"][0]))


def test_nonlinear_layers_are_refused():
    norms = {"q_norm": nn.LayerNorm(D), "k_norm": nn.LayerNorm(D)}
    layer = vt.MHAConfig().build(make_spec(extras={"qk_norm": norms}))
    for conversion in (vt.to_tucker, vt.to_dense, vt.to_mha):
        with pytest.raises(vt.PatchError, match="MHA with qk_norm is not bilinear"):
            conversion(layer)


def test_conversions_keep_dtype_mode_and_options():
    layer = vt.GQAConfig(num_kv_heads=2).build(make_spec(attn_drop=0.1, proj_drop=0.2)).requires_grad_(False).train()
    layer.fused_attn = False
    for result in (vt.to_tucker(layer), vt.to_mha(layer, tolerance=1e-6)):
        assert result.training
        assert not result.fused_attn
        assert (result.attn_drop.p, result.proj_drop.p) == (0.1, 0.2)
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in result.parameters())
