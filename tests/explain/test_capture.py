"""Attention maps of all methods and hosts: by formula, equal to the dense host's at full rank, and nothing left behind."""

import copy
import math
import weakref

import pytest
import torch
from torch import nn

import vit_tucker as vt
from tests.patching.test_families import FAMILIES, image, small_model
from tests.patching.trios import METHODS, make_trio
from tests.reference import all_configs, make_spec
from vit_tucker.errors import ExplainError, PatchError
from vit_tucker.explain.capture import attention_maps, record_attention
from vit_tucker.explain.explanation import check_output
from vit_tucker.hosts.families import read_host
from vit_tucker.hosts.find import find_attention

CONFIGS = all_configs(make_spec())


KINDS = {**dict.fromkeys(("vit_1", "eva02_1", "mixed_1", "dinov3_5"), METHODS), "beit": ("gqa",), "relpos": ("tucker",)}
KINDS["swin"] = ("mla", "tucker")
"""Methods by host: all where keys rotate or nothing is special; biases and windows are added to the scores of all alike."""


def inputs_of(model, images):
    """What each attention layer is given, by name."""
    seen = {}
    layers = find_attention(model)
    hooks = [m.register_forward_pre_hook(lambda _, args, n=n: seen.setdefault(n, args[0])) for n, m in layers.items()]
    model(images)
    for hook in hooks:
        hook.remove()
    return seen


def state_of(model):
    """All that a capture touches: switches, modes and hooks."""
    return [
        (getattr(m, "fused_attn", None), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
        for m in model.modules()
    ]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.method}-{CONFIGS.index(config) % 2}")
def test_maps_are_the_softmax_of_the_layers_dense_tensors(make_vit, images, config):
    model = make_vit()
    vt.patch(model, config)
    maps, given = attention_maps(model, images), inputs_of(model, images)
    assert list(maps) == [f"blocks.{i}.attn" for i in range(3)]
    for name, attn in maps.items():
        layer, x = model.get_submodule(name), given[name]
        pre = vt.to_dense(layer).pre  # (H, C + 1, C): the last row is the query bias
        scores = torch.einsum("bnc,hcd,bmd->bhnm", torch.cat([x, torch.ones_like(x[..., :1])], -1), pre, x)
        expected = (scores / math.sqrt(layer.head_dim)).softmax(-1)
        torch.testing.assert_close(attn, expected, rtol=0, atol=1e-12)  # float64, scores of order 1
        unscaled = scores.softmax(-1)
        assert (attn - unscaled).abs().max() > 1e-3


def test_maps_of_a_dense_layer_are_those_of_its_weights(make_vit, images):
    model = make_vit()
    maps, given = attention_maps(model, images), inputs_of(model, images)
    for name, attn in maps.items():
        weights = read_host(model.get_submodule(name)).weights
        q = torch.einsum("bnc,hcd->bhnd", given[name], weights.query) + weights.query_bias[:, None]
        k = torch.einsum("bnc,hcd->bhnd", given[name], weights.key) + weights.key_bias[:, None]
        torch.testing.assert_close(attn, (q @ k.mT / 6**0.5).softmax(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("host", "method"), [(host, method) for host, methods in KINDS.items() for method in methods])
def test_at_full_rank_the_maps_are_the_hosts(host, method):
    trio = make_trio(host, method)
    before = [state_of(model) for model in trio[:3]]
    dense, exact, small = (attention_maps(model, trio.x[:1]) for model in trio[:3])
    assert list(dense) == list(exact) == list(find_attention(trio.dense))
    for name, attn in dense.items():
        torch.testing.assert_close(exact[name], attn, rtol=0, atol=1e-8)  # as outputs agree, see trios
    assert max((small[name] - attn).abs().max() for name, attn in dense.items()) > 1e-3
    assert [state_of(model) for model in trio[:3]] == before


def test_the_output_is_the_one_without_capture(make_vit, images):
    model = make_vit()
    recording = record_attention(model, images)
    check_output(model, images, recording.output)
    with pytest.raises(ExplainError, match="output changes by 0.001 while its maps are captured"):
        check_output(model, images, recording.output + 1e-3)
    with pytest.raises(ExplainError, match="gives a list; explain needs a model with one output tensor"):
        check_output(model, images, [recording.output])


def test_training_mode_and_dropout_are_left_alone(make_vit, images):
    model = make_vit(attn_drop_rate=0.5, proj_drop_rate=0.5)
    vt.patch(model, vt.TuckerConfig(ranks=(3, 8, 8)))
    expected = attention_maps(model, images)
    model.train()
    model.blocks[1].eval()
    before = state_of(model)
    for name, attn in attention_maps(model, images).items():
        assert torch.equal(attn, expected[name])
        assert not attn.requires_grad
    assert state_of(model) == before


def test_everything_is_restored_after_an_error(make_vit, images):
    model = make_vit().train()
    before = state_of(model)
    with pytest.raises(AssertionError):
        attention_maps(model, images[..., :12])

    def fail(name, attn, grid):
        raise KeyError(name)

    with pytest.raises(KeyError, match=r"blocks\.0\.attn"):
        record_attention(model, images, reduce=fail)
    assert state_of(model) == before


def test_chosen_layers_reduced_at_once(make_vit, images):
    model = make_vit()
    recording = record_attention(
        model, images, [0, -1], lambda name, attn, grid: (name, attn.mean(1).shape, grid.num_prefix)
    )
    assert recording.maps == {name: (name, (2, 17, 17), 1) for name in ("blocks.0.attn", "blocks.2.attn")}
    assert recording.output.shape == (2, 7)
    with pytest.raises(PatchError, match="matches no attention module"):
        attention_maps(model, images, "blocks.7.attn")


def test_compiled_and_wrapped_models_run_as_they_are_underneath(make_vit, images):
    model = make_vit()
    expected = attention_maps(model, images)
    compiled = torch.compile(model, backend="eager")
    for other in (compiled, nn.DataParallel(model)):
        maps = attention_maps(other, images)
        assert all(torch.equal(maps[name], attn) for name, attn in expected.items())
    model.blocks[0].compile(backend="eager")
    assert torch.equal(attention_maps(model, images)["blocks.0.attn"], expected["blocks.0.attn"])


@pytest.mark.parametrize("name", ["davit_tiny", "nest.Nest", "tnt_s_patch16_224", "maxvit_rmlp_pico_rw_256"])
def test_other_hosts_dense_and_patched(name):
    model = small_model(name)
    x = image(model, FAMILIES[name].get("img_size"))
    dense = attention_maps(model, x)
    assert all(attn.ndim == 4 for attn in dense.values())
    patched = copy.deepcopy(model)
    vt.patch(patched, vt.full_rank_config(model, "gqa"))
    for layer, attn in attention_maps(patched, x).items():
        torch.testing.assert_close(attn, dense[layer], rtol=0, atol=1e-8)


def test_reduced_maps_are_gone_before_the_next(make_vit, images):
    alive, most = [], 0

    def keep(name, attn, grid):
        nonlocal most
        alive.append(weakref.ref(attn))
        most = max(most, sum(ref() is not None for ref in alive))
        return attn.mean()

    record_attention(make_vit(), images, reduce=keep)
    assert (len(alive), most) == (3, 1)
    alive.clear()
    most = 0
    kept = record_attention(make_vit(), images, reduce=lambda name, attn, grid: (keep(name, attn, grid), attn))
    assert most == 3
    assert len(kept.maps) == 3
