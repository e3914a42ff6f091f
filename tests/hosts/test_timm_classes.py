"""Which modules count as attention, and what is refused by name."""

import copy

import pytest
import timm
import torch
from timm.layers import set_fused_attn, use_fused_attn
from timm.models.vision_transformer import Attention
from torch import nn

import vit_tucker as vt
from tests.patching.test_families import FAMILIES, image
from vit_tucker.hosts.families import read_host
from vit_tucker.hosts.find import find_attention

TUCKER = vt.TuckerConfig(ranks=(1, 8, 8))


class Subclass(Attention):
    """Computes something else, for all we know."""


class StrangeAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.proj = nn.Linear(24, 24)


class Model(nn.Module):
    def __init__(self, *attentions: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(attentions)


@pytest.mark.parametrize("stranger", [Subclass(24, num_heads=4), StrangeAttention()], ids=["subclass", "unknown"])
def test_unknown_attention_is_refused_by_name_unless_excluded(stranger):
    model = Model(Attention(24, num_heads=4), stranger)
    config = vt.TuckerConfig(ranks=(2, 8, 8))
    with pytest.raises(
        vt.PatchError, match=rf"layers.1: unknown attention class .*{type(stranger).__name__}; leave it alone"
    ):
        vt.patch(model, config)
    assert isinstance(model.layers[0], Attention)
    report = vt.patch(model, config, exclude="layers.1")
    assert report.left_alone == ("layers.1",)
    assert model.layers[1] is stranger


CONVIT = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "num_heads": 4, "depth": 2, "local_up_to_layer": 0}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tnt_s_patch16_224", FAMILIES["tnt_s_patch16_224"]),
        ("convit_tiny", CONVIT),
        ("vit_tiny_patch16_224", {"depth": 1}),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_timms_switch_for_fused_attention_is_followed(name, options, fused):
    """As timm's own layers do when they are built: TNT's and ConViT's, which have no switch, when they are replaced."""
    before = use_fused_attn()
    try:
        set_fused_attn(fused)
        model = timm.create_model(name, **options).eval()
        dense = copy.deepcopy(model)
        vt.patch(model, vt.MHAConfig())
        set_fused_attn(not fused)
        layers = find_attention(model).values()
        assert {layer.fused_attn for layer in layers} == {fused}
    finally:
        set_fused_attn(before)
    seen = []
    for layer in layers:
        layer.attn_drop.register_forward_hook(lambda module, args, y: seen.append(y.shape[-1] == y.shape[-2]))
    x = image(dense, options.get("img_size")).float()
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
    assert seen == ([] if fused else [True] * len(layers))


def test_models_without_attention_say_so():
    with pytest.raises(vt.PatchError, match="ResNet has no attention module"):
        vt.plan(timm.create_model("resnet10t"), TUCKER)


def test_other_timm_attention_is_refused_with_the_reason():
    model = timm.create_model("swinv2_tiny_window8_256", embed_dim=24, depths=(1, 1, 1, 1))
    reason = r"layers.0.blocks.0.attn: .*swin_transformer_v2.WindowAttention can't be replaced: cosine attention"
    with pytest.raises(vt.PatchError, match=reason):
        vt.plan(model, TUCKER)


def test_attention_pooling_is_left_alone():
    model = timm.create_model("vit_base_patch16_siglip_224", embed_dim=48, depth=2, num_heads=4, num_classes=0)
    assert list(find_attention(model)) == ["blocks.0.attn", "blocks.1.attn"]
    assert vt.patch(model, vt.TuckerConfig(ranks=(2, 8, 8))).left_alone == ("attn_pool",)


def test_cross_attention_is_left_alone():
    model = timm.create_model("crossvit_tiny_240").eval()
    report = vt.patch(model, vt.TuckerConfig(ranks=(1, 8, 8)))
    assert all("fusion" in name for name in report.left_alone)
    assert report.left_alone
    assert torch.isfinite(model(torch.randn(1, 3, 240, 240))).all()


def test_changed_scale_is_refused():
    model = Model(Attention(24, num_heads=4))
    model.layers[0].scale = 1.0
    with pytest.raises(vt.PatchError, match=r"layers.0: softmax scale 1.0 is not 1/sqrt\(head_dim\)"):
        vt.plan(model, vt.TuckerConfig(ranks=(2, 8, 8)))


def test_weights_are_read_per_head():
    host = Attention(24, num_heads=4, qkv_bias=True)
    read = read_host(host)
    x = torch.randn(3, 24)
    q, k, v = host.qkv(x).chunk(3, -1)
    torch.testing.assert_close(x @ read.weights.query[1] + read.weights.query_bias[1], q[:, 6:12])
    torch.testing.assert_close(x @ read.weights.key[2] + read.weights.key_bias[2], k[:, 12:18])
    torch.testing.assert_close(x @ read.weights.value[3] + read.weights.value_bias[3], v[:, 18:])
    torch.testing.assert_close(
        torch.einsum("hd,hdo->o", v[0].view(4, 6), read.weights.out) + host.proj.bias, host.proj(v[0])
    )
    assert (read.spec.embed_dim, read.spec.num_heads, read.spec.head_dim, read.spec.out_dim) == (24, 4, 6, 24)


def test_own_head_width_of_the_host():
    try:
        host = Attention(24, num_heads=4, attn_head_dim=10, qkv_bias=True)
    except TypeError:
        pytest.skip("this timm has no attn_head_dim")
    model = Model(host).double().eval()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    reference = host(x)
    for name in vt.list_methods():
        vt.patch(model, vt.get_method(name).full_rank(read_host(host).spec))
        torch.testing.assert_close(model.layers[0](x), reference, rtol=1e-9, atol=1e-9)
        vt.unpatch(model)
