"""Rotations: the host's own, and latent RoPE with the properties that the paper claims for it (Lemma B.5, Cor 3.2.1)."""

import pytest
import timm.layers
import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat

import vit_tucker as vt
from tests.reference import dense_attention, make_angles, make_spec, make_table, make_weights, randomise, rope_of
from vit_tucker.attention import rope as rope_module
from vit_tucker.attention.rope import RopeSpec, head_rotations, rotate, rotate_heads, spread_rotations
from vit_tucker.tensor.rotary import rotary_distance

H, D, C = 4, 8, 32
SPEC = make_spec(embed_dim=C, num_heads=H, head_dim=D, out_dim=C, rope=RopeSpec(0))
MIXED = make_spec(embed_dim=C, num_heads=H, head_dim=D, out_dim=C, rope=RopeSpec(0, per_head=True))
LATENT = [
    vt.TuckerConfig(ranks=(3, 12, 10)),
    vt.TuckerConfig(ranks=(3, 12, 10), shared_kv=True),
    vt.TuckerConfig(ranks=(2, 3, 2)),
    vt.MLAConfig(q_lora_rank=12, kv_lora_rank=10),
    vt.MLAConfig(q_lora_rank=5, kv_lora_rank=2, shared_kv=False),
]


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(config, spec=SPEC):
    config.check(spec)
    return randomise(config.build(spec, dtype=torch.float64)).eval()


def attention_maps(module, x, **options):
    """Softmax rows (B, H, N, N) of a layer."""
    maps = []
    module.fused_attn = False
    handle = module.attn_drop.register_forward_hook(lambda m, args, output: maps.append(output))
    module(x, **options)
    handle.remove()
    return maps[0]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("per_head", [False, True])
def test_heads_are_rotated_as_timm_does(half, prefix, per_head):
    spec = make_spec(embed_dim=C, num_heads=H, head_dim=D, rope=RopeSpec(prefix, half, per_head))
    x, table = rand(2, H, 9, D), rope_of(spec)["rope"]
    found = rotate_heads(x, table, spec.rope)
    if half:
        sin, cos = table.chunk(2, -1)
        first, second = x[:, :, prefix:].chunk(2, -1)
        expected = x[:, :, prefix:] * cos + torch.cat([-second, first], -1) * sin  # timm's own in newer versions
    else:
        each = [apply_rot_embed_cat(x[:, i, prefix:], table[i] if per_head else table) for i in range(H)]
        expected = torch.stack(each, 1)
    torch.testing.assert_close(found[:, :, prefix:], expected, rtol=1e-15, atol=1e-15)
    assert torch.equal(found[:, :, :prefix], x[:, :, :prefix])
    assert not torch.allclose(found[:, :, prefix:], x[:, :, prefix:])
    torch.testing.assert_close(rotate_heads(found, table, spec.rope, inverse=True), x)


@pytest.mark.parametrize("config", LATENT, ids=str)
@pytest.mark.parametrize("spec", [SPEC, MIXED], ids=["axial", "mixed"])
def test_scores_depend_on_relative_positions_only(config, spec):
    """Lemma B.5: all tokens moved by the same distance see each other as before; some of them moved, they don't."""
    module, x = layer(config, spec), rand(2, 6, C)
    table = make_table(make_angles(spec, 40), half=False)
    here, there = table[..., :6, :], table[..., 30:36, :]
    torch.testing.assert_close(module(x, rope=there), module(x, rope=here), rtol=1e-10, atol=1e-10)
    torn = torch.cat([here[..., :3, :], there[..., 3:, :]], -2)
    assert not torch.allclose(module(x, rope=torn), module(x, rope=here), rtol=1e-3)


def grids():
    """Tables of timm's embeddings on an 8 x 8 grid, (8, 8, 2 D), or (H, 8, 8, 2 D)."""
    axial = timm.layers.RotaryEmbeddingCat(D, in_pixels=False, feat_shape=[8, 8], ref_feat_shape=[4, 4])
    yield "axial", SPEC, axial.get_embed().unflatten(0, (8, 8))
    if hasattr(timm.layers, "RotaryEmbeddingMixed"):
        mixed = timm.layers.RotaryEmbeddingMixed(H * D, 2, H, feat_shape=[8, 8])
        yield "mixed", MIXED, mixed.get_embed()[1].unflatten(1, (8, 8))
    if hasattr(timm.layers, "RotaryEmbeddingDinoV3"):
        dinov3 = timm.layers.RotaryEmbeddingDinoV3(D, feat_shape=[8, 8], rotate_half=False)
        yield "dinov3", SPEC, dinov3.get_embed().unflatten(0, (8, 8))


@pytest.mark.parametrize(
    ("name", "spec", "table"), list(grids()), ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("config", LATENT, ids=str)
def test_windows_of_a_grid_score_alike_wherever_they_lie(config, name, spec, table):
    """On ViT's 2-D grids, with the tables that timm makes: windows of 3 x 3 tokens."""
    module, x = layer(config, spec), rand(2, 9, C)

    def window(top, left):
        return table[..., top : top + 3, left : left + 3, :].flatten(-3, -2).double().detach()

    reference = module(x, rope=window(0, 0))
    for corner in ((4, 1), (1, 5), (5, 5)):
        torch.testing.assert_close(
            module(x, rope=window(*corner)), reference, rtol=1e-5, atol=1e-5
        )  # tables in float32
    transposed = window(0, 0).unflatten(-2, (3, 3)).transpose(-3, -2).flatten(-3, -2)
    assert not torch.allclose(module(x, rope=transposed), reference, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", LATENT, ids=str)
@pytest.mark.parametrize("half", [False, True])
def test_queries_fuse_into_one_matrix_per_head(config, half):
    """Cor 3.2.1: score_i = (x~_m L_i) R(m) R(n)^T (x~_n U3)^T with matrices that know no position."""
    spec = make_spec(embed_dim=C, num_heads=H, head_dim=D, out_dim=C, rope=RopeSpec(2, half))
    module, x, angles = layer(config, spec), rand(2, 9, C), make_angles(spec)
    fused = module.rotary_pairs()
    ones = torch.cat([x, torch.ones(2, 9, 1, dtype=x.dtype)], -1)
    turn = torch.nn.functional.pad(angles, (0, 0, 2, 0))[:, fused.rotations[0] % (D // 2)]  # (N, R/2)
    q, k = (rotate(ones[:, None] @ side, turn.sin(), turn.cos()) for side in (fused.left, fused.right))  # (B, H, N, R)
    expected = (q @ k.mT * spec.scale).softmax(-1)
    torch.testing.assert_close(
        attention_maps(module, x, rope=make_table(angles, half)), expected, rtol=1e-10, atol=1e-12
    )
    assert not torch.allclose(attention_maps(module, x), expected, rtol=1e-3)


def test_rope_of_each_head_does_not_fuse():
    """WQ_i R(m - n) WK_i^T is another matrix for every distance, so there is nothing to fuse; in the latent there is."""
    weights = make_weights(SPEC)
    angles = make_angles(SPEC)
    fused = [
        rotate(weights.query[0], angle.sin().expand(C, -1), angle.cos().expand(C, -1)) @ weights.key[0].mT
        for angle in angles[:2]
    ]
    assert (fused[1] - fused[0]).norm() > 0.3 * fused[0].norm()
    x, module = rand(1, 9, C), vt.MHAConfig().build(SPEC, dtype=torch.float64).eval()
    with torch.no_grad():
        module.convert_from(weights)
    q = torch.einsum(
        "bnc,hcd,hed->bhne", x, weights.query, weights.key
    )  # fused, then rotated in the space of the tokens
    turn = make_angles(SPEC)[:, torch.arange(C // 2) % (D // 2)]
    scores = rotate(q, turn.sin(), turn.cos()) @ rotate(x, turn.sin(), turn.cos()).unsqueeze(1).mT * SPEC.scale
    assert not torch.allclose(scores.softmax(-1), attention_maps(module, x, **rope_of(SPEC)), rtol=0.05)


@pytest.mark.parametrize("config", LATENT, ids=str)
@pytest.mark.parametrize("spec", [SPEC, MIXED], ids=["axial", "mixed"])
def test_tables_per_image(config, spec):
    """Patch dropout and images of many sizes: each image with a table of its own."""
    module, x = layer(config, spec), rand(3, 6, C)
    tables = make_table(make_angles(spec, 40), half=False)
    each = [tables[..., torch.randperm(40, generator=torch.Generator().manual_seed(i))[:6], :] for i in range(3)]
    together = torch.stack(each) if spec.rope.per_head else torch.stack(each).unsqueeze(1)
    expected = torch.cat([module(x[i : i + 1], rope=table) for i, table in enumerate(each)])
    torch.testing.assert_close(module(x, rope=together), expected)
    if not spec.rope.per_head:  # as older timm hands them over
        torch.testing.assert_close(module(x, rope=together.squeeze(1)), expected)
    assert not torch.allclose(module(x, rope=each[0]), expected)


def test_odd_widths_are_refused_with_the_even_ones():
    with pytest.raises(
        vt.PatchError, match=r"ranks=\[3, 8, 7\]: key rank 7 is odd: latent RoPE rotates pairs, choose 6 or 8"
    ):
        vt.TuckerConfig(ranks=(3, 8, 7)).check(SPEC)
    with pytest.raises(vt.PatchError, match="kv_lora_rank 1 is odd: latent RoPE rotates pairs, choose 2"):
        vt.MLAConfig(q_lora_rank=4, kv_lora_rank=1).check(SPEC)
    vt.TuckerConfig(ranks=(3, 8, 8), post_ranks=(3, 8, 7)).check(SPEC)  # values don't rotate
    vt.TuckerConfig(ranks=(3, 8, 7)).check(make_spec(embed_dim=C, num_heads=H, head_dim=D, out_dim=C))
    with pytest.raises(vt.PatchError, match="conversion='hooi' does not support hosts with RoPE"):
        vt.TuckerConfig(ranks=(3, 8, 8), conversion="hooi").check(SPEC)


def test_latent_pairs_are_spread_over_the_table():
    assert spread_rotations(8, 4, 8).tolist() == [0, 1, 2, 3]
    assert spread_rotations(4, 4, 8).tolist() == [1, 3]
    assert spread_rotations(2, 4, 8).tolist() == [2]
    assert spread_rotations(12, 4, 8).tolist() == [0, 1, 2, 3, 5, 7]  # then those of the next head
    assert spread_rotations(80, 4, 8).max() < 16
    assert head_rotations(RopeSpec(), 2, 4).tolist() == [[0, 1], [0, 1]]
    assert head_rotations(RopeSpec(per_head=True), 2, 4).tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("name", vt.list_methods())
def test_layers_without_rope_refuse_a_table(name):
    spec = make_spec()
    module = vt.get_method(name).example(spec).build(spec)
    with pytest.raises(vt.PatchError, match="got a table of rotations, but the layer that it replaced had no RoPE"):
        module(torch.zeros(1, 3, 24), rope=torch.zeros(3, 12))


@pytest.mark.parametrize("config", LATENT[:4], ids=str)
def test_learned_angles_get_gradients(config):
    module, x = layer(config, MIXED), rand(2, 6, C)
    angles = make_angles(MIXED, 6).requires_grad_(True)
    module(x, rope=make_table(angles, half=False)).square().sum().backward()
    assert angles.grad.abs().sum() > 0


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_gqa_svd_keeps_the_rotations_of_its_heads(half, per_head):
    """Exact with all heads; with fewer better than the mean, though the keys keep their pairs."""
    spec = make_spec(embed_dim=C, num_heads=H, head_dim=D, out_dim=C, rope=RopeSpec(1, half, per_head))
    weights, x, given = make_weights(spec), rand(2, 9, C), rope_of(spec)
    errors = {}
    for groups in (H, 2, 1):
        for conversion in ("svd", "mean"):
            module = vt.GQAConfig(num_kv_heads=groups, conversion=conversion).build(spec, dtype=torch.float64).eval()
            with torch.no_grad():
                module.convert_from(weights)
            errors[groups, conversion] = rotary_distance(weights.rotary_pairs(spec.rope), module.rotary_pairs())
            if groups == H:
                expected = dense_attention(weights, x, spec)
                torch.testing.assert_close(module(x, **given), expected, rtol=1e-9, atol=1e-9)
                assert not torch.allclose(module(x), expected, rtol=1e-3)
    assert errors[H, "svd"] < 1e-12
    assert 0.05 < errors[2, "svd"] < 0.95 * errors[2, "mean"]
    assert errors[2, "svd"] < errors[1, "svd"] < 0.95 * errors[1, "mean"]


SPECIAL = {  # ranks of the pre-softmax tensor, (H, query, key), with RoPE of all heads and with mixed RoPE
    "mha": (vt.MHAConfig(), (H, C, H * D), (H, C, H * D)),
    "mqa": (vt.GQAConfig(num_kv_heads=1), (H, C, D), (H, C, H * D)),
    "gqa": (vt.GQAConfig(num_kv_heads=2), (H, C, 2 * D), (H, C, H * D)),
    "mla": (vt.MLAConfig(q_lora_rank=6, kv_lora_rank=10), (H, 7, 10), (H, 7, 10)),
    "mla, two latents": (vt.MLAConfig(q_lora_rank=6, kv_lora_rank=10, shared_kv=False), (H, 7, 10), (H, 7, 10)),
    "tucker": (vt.TuckerConfig(ranks=(3, 12, 10)), (3, 12, 10), (3, 12, 10)),
    "tucker, shared": (vt.TuckerConfig(ranks=(3, 12, 10), shared_kv=True), (3, 12, 10), (3, 12, 10)),
}


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_other_attentions_with_rope_are_tucker_attention_with_latent_rope(name, per_head, half, bias):
    config, *ranks = SPECIAL[name]
    spec = make_spec(embed_dim=C, num_heads=H, head_dim=D, out_dim=C, qkv_bias=bias, rope=RopeSpec(1, half, per_head))
    source, x, given = layer(config, spec), rand(2, 9, C), rope_of(spec)
    tucker = vt.to_tucker(source)
    torch.testing.assert_close(tucker(x, **given), source(x, **given), rtol=1e-10, atol=1e-10)
    query = ranks[per_head][1] - (name.startswith("mla") and not bias)  # the query bias is one more coordinate
    assert tucker.ranks[0] == (ranks[per_head][0], query, ranks[per_head][2])
    assert rotary_distance(source.rotary_pairs(), tucker.rotary_pairs()) < 1e-12
    tucker.pair_rotations.copy_(tucker.pair_rotations.roll(1))
    assert not torch.allclose(tucker(x, **given), source(x, **given), rtol=1e-3)
    with pytest.raises(vt.PatchError, match="with RoPE is not bilinear"):
        vt.to_dense(source)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [slice(0, 6), slice(1, 7), slice(0, 12, 2)])
def test_rotating_complex_numbers_equals_rotating_their_parts(columns, dtype, monkeypatch):
    """Wherever the pairs lie in memory; what is recorded gets the parts. Angles are float32 at least, so both round once, in the
    end: float32 sums of two products may differ in a last bit, bfloat16 results by a step of 2**-8, their gradients by a few."""
    g = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(2, 5, 13, generator=g).to(dtype)[..., columns].requires_grad_()
    angle = (6 * torch.rand(5, 3, generator=g)).to(wide).requires_grad_()
    results = []
    for recorded in (False, True):
        monkeypatch.setattr(rope_module, "is_traced", lambda recorded=recorded: recorded)
        y = rotate(x, angle.sin(), angle.cos())
        assert y.dtype == dtype
        results.append((y, *torch.autograd.grad(y.square().sum() + y[..., 0].sum(), (x, angle))))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    for fast, parts in zip(*results, strict=True):
        torch.testing.assert_close(fast, parts, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(results[0][0], rotate(x, -angle.sin(), angle.cos()), rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("images", [1, 3])
def test_one_token_rotates_as_it_does_among_others(dtype, half, images):
    """A step of decoding rotates queries and key together."""
    spec, heads, width = RopeSpec(half=half), 4, 6
    q, k = (rand(images, n, 5, width, seed=n).to(dtype) for n in (heads, 1))
    table, rotations = rand(images, 5, 2 * 8, seed=9).to(dtype), torch.tensor([1, 3, 6])
    all_q, all_k = rope_module.rotate_latent(q, k, table, rotations, spec)
    one_q, one_k = rope_module.rotate_latent(q[:, :, 2:3], k[:, :, 2:3], table[:, 2:3], rotations, spec)
    torch.testing.assert_close(one_q, all_q[:, :, 2:3])
    torch.testing.assert_close(one_k, all_k[:, :, 2:3])
    assert not torch.allclose(one_q, q[:, :, 2:3], atol=0.1)
