"""Models with RoPE and with position biases through conversion, calibration, rank rules and reports."""

from itertools import product

import pytest
import torch

import vit_tucker as vt
from tests.patching.test_families import FAMILIES, image, small_model
from vit_tucker.analysis.spectra import analyse
from vit_tucker.hosts.timm_classes import has_mixed_rope

ROPE = ["eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224", "vit_small_patch16_dinov3"]
BIASED = ["beit_base_patch16_224", "vit_srelpos_small_patch16_224", "swin_tiny_patch4_window7_224"]
METHODS = vt.list_methods()
CONFIGS = {
    "tucker": vt.TuckerConfig(ranks=(2, 6, 6)),
    "tucker shared": vt.TuckerConfig(ranks=(2, 6, 6), shared_kv=True),
    "mla": vt.MLAConfig(q_lora_rank=6, kv_lora_rank=6),
    "mla two latents": vt.MLAConfig(q_lora_rank=6, kv_lora_rank=6, shared_kv=False),
    "gqa svd": vt.GQAConfig(num_kv_heads=1, conversion="svd"),
}


def batch(name, model, count=24, seed=1):
    size = FAMILIES[name].get("img_size", 224)
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CALIBRATED = [
    *((name, config) for name in ROPE for config in CONFIGS),
    *((BIASED[i % len(BIASED)], config) for i, config in enumerate(CONFIGS)),
    ("volo.VOLO", "tucker"),
]
"""Rotations are part of the tensors that are converted, each way of its own; a bias or a grid is part of the call alone."""


@pytest.mark.parametrize(("name", "config"), CALIBRATED)
def test_calibrated_conversions_beat_the_weights_alone(name, config):
    model, config = small_model(name), CONFIGS[config]
    images = batch(name, model, 8 if name == "volo.VOLO" else 24)
    vt.patch(model, config)
    record = vt.patch_record(model)
    dense = list(record.originals.values())
    errors = {}
    for kind in ("plain", "calibrated"):
        vt.unpatch(model)
        report = vt.patch(model, config, calibration=images if kind == "calibrated" else None)
        errors[kind] = layer_errors(model, images)
    assert len(dense) == len(report.layers)
    for layer, plain, calibrated in zip(report.layers, errors["plain"], errors["calibrated"], strict=True):
        assert calibrated < plain * 1.001
        assert layer.output_error == pytest.approx(calibrated, rel=1e-6)
    assert sum(errors["calibrated"]) < 0.9 * sum(errors["plain"])


def layer_errors(model, images):
    """||y^ - y|| / ||y - mean y|| of each patched layer on the inputs that its original has in the dense model."""
    originals = vt.patch_record(model).originals
    replacements = {name: model.get_submodule(name) for name in originals}
    sums = {name: [] for name in originals}
    vt.unpatch(model)
    handles = []
    for name, original in originals.items():

        def compare(module, args, kwargs, y, name=name):
            wrong = replacements[name](*args, **kwargs) - y
            channel = 1 if replacements[name].spec.layout == "channels_first" else -1
            others = [d for d in range(y.ndim) if d != channel % y.ndim]
            sums[name].append((wrong.norm() / (y - y.mean(others, keepdim=True)).norm()).item())

        handles.append(original.register_forward_hook(compare, with_kwargs=True))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    vt.patch(model, vt.MHAConfig())  # something to unpatch
    return [sums[name][0] for name in originals]


RULES = {"budget": 0.2}, {"flops": 0.3}, {"energy": 0.9, "multiple_of": 3}
RULED = [
    *((ROPE[0], calibrated, rule) for calibrated in (False, True) for rule in RULES),
    *((name, bool(i % 2), rule) for i, (name, rule) in enumerate(product([*ROPE[1:], BIASED[0]], RULES))),
]
"""One model with every rule, the others with each once: the search sees tables of errors and costs, not models."""


@pytest.mark.parametrize(("name", "calibrated", "rule"), RULED, ids=str)
def test_rank_rules(name, calibrated, rule):
    model = small_model(name)
    config = vt.TuckerConfig(ranks={"multiple_of": 2, **rule})
    report = vt.patch(model, config, calibration=batch(name, model) if calibrated else None)
    ranks = [module.ranks for module in model.modules() if hasattr(module, "ranks")]
    assert len(ranks) == 2
    if name in ROPE:
        assert all(pre[2] % 2 == 0 for pre, _ in ranks)
    if "budget" in rule:
        assert 0.8 * 0.2 < report.params_after / report.params_before <= 0.2
    if "flops" in rule:
        assert 0.6 * 0.3 < report.flops_after / report.flops_before <= 0.3
    if "energy" in rule and not calibrated:
        lost = sum(layer.pre_error**2 + layer.post_error**2 for layer in report.layers) / (2 * len(ranks))
        assert lost <= 0.1 + 1e-9
    assert torch.isfinite(model(image(model, FAMILIES[name]["img_size"]))).all()


def test_reports_say_that_latent_rope_is_an_approximation():
    model = small_model(ROPE[0])
    note = "latent RoPE: 2 layers rotate one latent key of width 6 for all heads, an approximation of the host's RoPE"
    report = vt.plan(model, vt.TuckerConfig(ranks=(2, 6, 6)))
    assert note in str(report)
    assert "(exact from width 48 on)" in report.notes[0]
    assert note in str(vt.plan(model, vt.MLAConfig(q_lora_rank=6, kv_lora_rank=6)))
    assert "keep their rotations exactly" in str(vt.plan(model, vt.full_rank_config(model, "tucker")))
    assert vt.plan(model, vt.GQAConfig(num_kv_heads=1)).notes == ()
    assert vt.plan(small_model("vit_tiny_patch16_224"), vt.TuckerConfig(ranks=(2, 6, 6))).notes == ()


@pytest.mark.parametrize("name", ROPE)
def test_patched_models_rebuild_from_their_state_with_the_chosen_rotations(name):
    model, x = small_model(name), image(small_model(name), 32)
    config = vt.TuckerConfig(ranks=(2, 6, 6))
    vt.patch(model, config)
    columns = model.blocks[0].attn.pair_rotations
    expected = model(x)
    fresh = small_model(name)
    vt.patch(fresh, config.model_copy(update={"init": "random"}))
    assert not torch.equal(fresh.blocks[0].attn.pair_rotations, columns)  # spread evenly, not chosen
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), expected)


@pytest.mark.parametrize("name", ROPE)
def test_spectra_of_models_with_rope(name):
    model = small_model(name)
    rows, *_ = analyse(model, batch(name, model))
    keys = [row for row in rows if row.mode == "key"]
    assert len(keys) == 4  # 2 layers, plain and whitened
    for row in keys:
        assert len(row.values) == 48
        torch.testing.assert_close(row.values[::2], row.values[1::2])  # pairs
        others = [r for r in rows if (r.layer, r.tensor, r.whitened) == (row.layer, "pre", row.whitened)]
        norms = [r.values.square().sum().item() for r in others]
        assert norms == pytest.approx([norms[0]] * 3, rel=1e-9)
    vt.patch(model, vt.TuckerConfig(ranks=(2, 6, 6)))
    patched = [row for row in analyse(model)[0] if row.mode == "key"]
    assert all(int((row.values > 1e-9 * row.values[0]).sum()) == 6 for row in patched)


def test_heads_of_one_host_with_fewer_keys_stay_as_they_are():
    """A host with key/value heads of its own (AttentionRope): GQA with as many is exact, the report counts what there was."""
    timm_attention = pytest.importorskip("timm.layers.attention")
    try:
        host = timm_attention.AttentionRope(48, num_heads=4, num_kv_heads=2, qkv_fused=False, num_prefix_tokens=0)
    except TypeError:
        pytest.skip("this timm's AttentionRope has no num_kv_heads")
    model, x = torch.nn.Sequential(host).double().eval(), torch.randn(2, 5, 48, dtype=torch.float64)
    expected = host(x)
    for config in (
        vt.GQAConfig(num_kv_heads=2),
        vt.MHAConfig(),
        vt.full_rank_config(model, "tucker"),
        vt.full_rank_config(model, "mla"),
    ):
        report = vt.patch(model, config)
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
        assert report.params_before == sum(p.numel() for p in host.parameters())
        vt.unpatch(model)
    assert vt.plan(model, vt.GQAConfig(num_kv_heads=2)).layers[0].params_after.total == report.params_before


@pytest.mark.parametrize("method", vt.list_methods())
def test_position_augmentation_reaches_the_patched_layers(method):
    """DINOv3's random coordinates in training: each pass has its own table, and the patched model follows it."""
    try:
        model = small_model(
            "vit_small_patch16_dinov3", rope_rescale_coords=2.0, rope_shift_coords=0.5, num_classes=5
        ).train()
    except TypeError:
        pytest.skip("this timm has no position augmentation")
    x, outputs = image(model, 32), {}
    for name in ("dense", method):
        for seed in (0, 1):
            torch.manual_seed(seed)
            outputs[name, seed] = model(x)
        if name == "dense":
            vt.patch(model, vt.full_rank_config(model, method))
    for seed in (0, 1):
        torch.testing.assert_close(
            outputs[method, seed], outputs["dense", seed], rtol=1e-5, atol=1e-5
        )  # float32 tables
    assert not torch.allclose(outputs[method, 0], outputs[method, 1], rtol=1e-5, atol=1e-5)


class OwnEmbedding(torch.nn.Module):
    """A user's embedding that makes a table for each head, by another class than timm's."""

    def __init__(self, inner):
        super().__init__()
        self.inner = (inner,)  # not a submodule

    def get_embed(self, *args, **kwargs):
        return self.inner[0].get_embed(*args, **kwargs)


def test_tables_of_each_head_are_known_by_the_models_word():
    name = "vit_small_patch16_rope_mixed_224"
    model = small_model(name)
    x, embedding = image(model, 32), model.rope
    expected = model(x)
    model.rope = OwnEmbedding(embedding)
    assert has_mixed_rope(model)
    assert not has_mixed_rope(small_model(ROPE[0]))
    vt.patch(model, vt.full_rank_config(model, "tucker"))
    torch.testing.assert_close(model(x), expected, rtol=1e-7, atol=1e-8 * expected.abs().max().item())
    embedding.__class__ = type("Derived", (type(embedding),), {})
    assert has_mixed_rope(torch.nn.ModuleList([embedding]))


NAFLEX = {
    "axial": {"rope_type": "axial"},
    "mixed": {"rope_type": "mixed"},
    "dinov3": {"rope_type": "dinov3", "rope_rotate_half": True},
    "mrope": {"rope_type": "mrope", "rope_mrope_section": [2, 2, 2]},
}


def naflex_images():
    """Three images of 4 x 4, 2 x 8 and 3 x 4 patches in one batch, the last padded."""
    grids = ((4, 4), (2, 8), (3, 4))
    coordinates = [torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in grids]
    valid = torch.tensor([[i < h * w for i in range(16)] for h, w in grids])
    patches = torch.randn(3, 16, 16 * 16 * 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {
        "patches": patches,
        "patch_coord": torch.nn.utils.rnn.pad_sequence(coordinates, batch_first=True),
        "patch_valid": valid,
    }


@pytest.mark.parametrize(
    ("kind", "method"), list(zip([*NAFLEX, *NAFLEX], [*METHODS, *METHODS[1:], METHODS[0]], strict=True))
)
def test_images_of_several_shapes_in_one_batch(kind, method):
    """NaFlexVit: each image has a table and a mask of its own. Each kind of table with two methods."""
    try:
        model = small_model("naflexvit_base_patch16_gap", **NAFLEX[kind])
    except (TypeError, AttributeError, ValueError):
        pytest.skip(f"this timm's NaFlexVit has no {kind} RoPE")
    x = naflex_images()
    expected = model(x)
    assert not torch.allclose(model({**x, "patch_coord": x["patch_coord"].roll(1, 0)})[1], expected[1], rtol=1e-3)
    vt.patch(model, vt.full_rank_config(model, method))
    torch.testing.assert_close(model(x), expected, rtol=1e-7, atol=1e-8 * expected.abs().max().item())
    vt.unpatch(model)
    vt.patch(model, vt.TuckerConfig(ranks=(2, 6, 6)))
    assert not torch.allclose(model(x), expected, rtol=1e-3)
