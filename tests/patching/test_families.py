"""A fixed sample of timm's families, small models of the real classes: every method carries what its map says, exactly."""

from importlib import import_module
from itertools import chain

import pytest
import timm
import torch
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias
from torch import nn

import vit_tucker as vt
from tests.reference import randomise
from vit_tucker.analysis.host_map import model_entry
from vit_tucker.hosts.families import read_host
from vit_tucker.hosts.find import find_attention
from vit_tucker.hosts.images import input_shape

PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
STAGES = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}
FAMILIES: dict[str, dict] = {
    "vit_tiny_patch16_224": PLAIN,
    "vit_wee_patch16_reg1_gap_256": PLAIN,
    "vit_base_patch16_clip_224": PLAIN,
    "vit_base_patch16_siglip_224": {**PLAIN, "num_classes": 0},
    "vit_small_patch14_reg4_dinov2": PLAIN,
    "vit_medium_patch32_clip_224": PLAIN,
    "deit_tiny_distilled_patch16_224": PLAIN,
    "deit3_small_patch16_224": PLAIN,
    "flexivit_small": {**PLAIN, "img_size": 48, "patch_size": 16},
    "beit_base_patch16_224": PLAIN,
    "beitv2_base_patch16_224": PLAIN,
    "eva_giant_patch14_224": PLAIN,
    "eva02_tiny_patch14_224": PLAIN,
    "eva02_base_patch16_clip_224": PLAIN,
    "vit_small_patch16_rope_224": PLAIN,
    "vit_small_patch16_rope_mixed_224": PLAIN,
    "vit_betwixt_patch16_rope_reg4_gap_256": PLAIN,
    "vit_small_patch16_dinov3": PLAIN,
    "vit_pe_core_tiny_patch16_384": {**PLAIN, "num_classes": 5},
    "vit_relpos_small_patch16_224": PLAIN,
    "vit_srelpos_small_patch16_224": PLAIN,
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "window_size": 4,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 4),
    },
    "maxvit_rmlp_pico_rw_256": {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64)},
    "coatnet_nano_rw_224": {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64)},
    "davit_tiny": {"embed_dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)},
    "nest.Nest": {
        "img_size": 64,
        "patch_size": 4,
        "embed_dims": (16, 16, 32),
        "num_heads": (2, 2, 4),
        "depths": (1, 1, 1),
    },
    "tnt_s_patch16_224": {"img_size": 32, "embed_dim": 48, "inner_dim": 16, "depth": 2},
    "volo.VOLO": {
        "img_size": 64,
        "layers": (1, 1, 1),
        "embed_dims": (24, 48, 48),
        "num_heads": (2, 4, 4),
        "mlp_ratio": (3, 3, 3),
        "downsamples": (True, False, False),
        "outlook_attention": (True, False, False),
    },
    "metaformer.MetaFormer": {
        "depths": (1, 1),
        "dims": (16, 64),
        "token_mixers": (nn.Identity, Attention),
        "norm_layers": (LayerNorm2dNoBias, LayerNormNoBias),
    },
    "fastvit_sa12": {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 64)},
    "visformer_tiny": {"img_size": 64, "embed_dim": 48, "depth": (1, 1, 1)},
    "crossvit_tiny_240": {"embed_dim": (24, 48), "depth": ((1, 1, 0), (1, 1, 0)), "num_heads": (2, 2)},
    "naflexvit_base_patch16_gap": {"embed_dim": 48, "depth": 2, "num_heads": 4, "img_size": 64},
    "mobilevit_xxs": {},
    "beit3_base_patch16_224": PLAIN,
}

PIXELS = {"davit_tiny": 64, "metaformer.MetaFormer": 64, "fastvit_sa12": 64, "mobilevit_xxs": 64}
"""Sides of the images of families that are not built for a size."""
SAME_ATTENTION = {
    "vit_tiny_patch16_224": (
        "vit_wee_patch16_reg1_gap_256",
        "vit_base_patch16_clip_224",
        "vit_medium_patch32_clip_224",
        "deit_tiny_distilled_patch16_224",
        "deit3_small_patch16_224",
        "flexivit_small",
    ),
    "beit_base_patch16_224": ("beitv2_base_patch16_224",),
    "eva_giant_patch14_224": ("vit_betwixt_patch16_rope_reg4_gap_256",),
}
"""Families whose attention is that of another: class, features, layout and rotations."""


def small_model(name: str, **more) -> nn.Module:
    """A small random model of a family, float64, eval."""
    options = {**FAMILIES[name], **more}
    module, _, cls = name.rpartition(".")
    if module:  # the models of these families fix their sizes
        return randomise(getattr(import_module(f"timm.models.{module}"), cls)(**options)).double().eval()
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    return randomise(timm.create_model(name, **options)).double().eval()


def image(model: nn.Module, size: int | None = None) -> torch.Tensor:
    """(2, channels, H, W) as the model takes it."""
    shape = (3, size, size) if size else input_shape(model)
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def kinds_of_attention(name: str) -> set[tuple]:
    """Returns class, features, layout and rotations of a family's attention layers."""
    model = small_model(name)
    kinds = set()
    for module in find_attention(model).values():
        spec = read_host(module, model).spec
        rope = None if spec.rope is None else (spec.rope.half, spec.rope.per_head)
        kinds.add((type(module), tuple(spec.features), spec.layout, rope))
    return kinds


@pytest.mark.parametrize("name", SAME_ATTENTION)
def test_families_with_the_same_attention(name):
    expected = kinds_of_attention(name)
    assert all(kinds_of_attention(other) == expected for other in SAME_ATTENTION[name])
    others = SAME_ATTENTION.keys() - {name}
    assert all(kinds_of_attention(other) != expected for other in others)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in chain(*SAME_ATTENTION.values())])
@torch.no_grad()
def test_every_method_is_exact_where_the_map_says_so(name):
    model = small_model(name)
    x = image(model, PIXELS.get(name, FAMILIES[name].get("img_size")))
    expected = model(x)
    entry = model_entry(name, model)
    assert entry.patchable("gqa"), entry
    assert entry.patchable("mha"), entry
    for method, status in entry.methods.items():
        if not entry.patchable(method):
            assert "can't carry" in status
            first = next(iter(find_attention(model).values()))
            with pytest.raises(vt.PatchError, match="can't carry"):
                vt.patch(model, vt.get_method(method).example(read_host(first, model).spec))
            with pytest.raises(vt.PatchError, match="can't carry"):
                vt.full_rank_config(model, method)
            continue
        config = vt.full_rank_config(model, method)
        report = vt.patch(model, config)
        torch.testing.assert_close(model(x), expected, rtol=1e-7, atol=1e-8 * expected.abs().max().item())
        assert report.params_before == sum(
            p.numel() for m in vt.patch_record(model).originals.values() for p in m.parameters()
        )
        assert report.params_after == sum(p.numel() for m in find_attention(model).values() for p in m.parameters())
        vt.unpatch(model)
        assert torch.equal(model(x), expected)
