"""Every registered method x everything that a host may do beyond plain attention: carried exactly, or the host is refused."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import vit_tucker
from tests.reference import make_spec, randomise
from vit_tucker.attention.host import REASONS
from vit_tucker.hosts.families import read_host
from vit_tucker.hosts.find import find_attention

VIT = {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 4}
HOSTS = {
    "rope": ("eva02_tiny_patch14_224", {**VIT, "patch_size": 16}),
    "qk_norm": ("vit_tiny_patch16_224", {**VIT, "qk_norm": True}),
    "scale_norm": ("vit_tiny_patch16_224", {**VIT, "scale_attn_norm": True}),
    "gate": ("vit_tiny_patch16_224", VIT),
    "position_bias": ("beit_base_patch16_224", VIT),
    "layout": ("visformer_tiny", {"img_size": 32, "embed_dim": 48, "depth": (1, 1, 1)}),
}
CASES = [(name, feature) for name in vit_tucker.list_methods() for feature in HOSTS]


def make_host(feature: str) -> nn.Module:
    """A small timm model whose attention has the feature, float64, eval."""
    name, options = HOSTS[feature]
    try:
        model = timm.create_model(name, num_classes=5, **options)
        if feature == "gate":
            model.blocks[0].attn = type(model.blocks[0].attn)(48, num_heads=4, qkv_bias=True, gated=True)
    except (TypeError, RuntimeError):
        pytest.skip(f"this timm has no {name} with {feature}")
    return randomise(model).double().eval()


def specs_of(model: nn.Module) -> dict[str, vit_tucker.HostSpec]:
    """The hosts' specs by module name."""
    return {name: read_host(m, model).spec for name, m in find_attention(model).items()}


def test_there_is_a_host_for_every_feature():
    assert set(HOSTS) == set(REASONS)
    for feature in HOSTS:
        try:
            model = make_host(feature)
        except pytest.skip.Exception:
            continue
        assert all(feature in spec.features for spec in specs_of(model).values()), feature


@pytest.mark.parametrize(("name", "feature"), CASES)
def test_features_are_carried_exactly_or_refused(name, feature):
    model, method = make_host(feature), vit_tucker.get_method(name)
    specs = specs_of(model)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = model(x)
    if all(method.carries.issuperset(spec.features) for spec in specs.values()):
        vit_tucker.patch(model, vit_tucker.full_rank_config(model, name))
        torch.testing.assert_close(model(x), expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item())
        return
    before = dict(model.named_modules())
    first, spec = next(iter(specs.items()))
    plain = replace(spec, rope=None, layout="sequence", extras={})
    missing = next(found for found in spec.features if found not in method.carries)
    for config in (method.full_rank(plain), method.example(plain)):
        with pytest.raises(vit_tucker.PatchError, match=f"^{first}: {name} can't carry the host's {missing}: ."):
            vit_tucker.patch(model, config)
    assert dict(model.named_modules()) == before
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", vit_tucker.list_methods())
def test_what_a_method_carries_are_features(name):
    method = vit_tucker.get_method(name)
    assert method.carries <= set(REASONS), "no host has such a feature"
    method.full_rank(make_spec()).check(make_spec())
