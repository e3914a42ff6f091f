"""timm's own tools keep working on a patched model."""

import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.utils import AttentionExtract

import vit_tucker as vt
from tests.conftest import make_spec
from vit_tucker.patching.probe import count_tokens, input_shape

CONFIGS = [vt.get_method(name).example(make_spec()) for name in vt.list_methods()]


@pytest.fixture(params=CONFIGS, ids=lambda config: config.method)
def patched(request, make_vit):
    model = make_vit(dtype=torch.float32)
    vt.patch(model, request.param)
    return model


def test_features_and_intermediates(patched, images):
    x = images.float()
    features = patched.forward_features(x)
    torch.testing.assert_close(patched.forward_head(features), patched(x))
    final, intermediates = patched.forward_intermediates(x, indices=2)
    torch.testing.assert_close(final, features)
    assert [tuple(i.shape) for i in intermediates] == [(2, 24, 4, 4)] * 2


@pytest.mark.parametrize("method", ["hook", "fx"])
def test_attention_maps_can_be_extracted(patched, images, method):
    for block in patched.blocks:
        block.attn.fused_attn = False
    maps = AttentionExtract(patched, method=method)(images.float())
    assert len(maps) == 3
    for attention in maps.values():
        assert attention.shape == (2, 4, 17, 17)
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 17))


def test_layer_decay_finds_the_block_of_each_parameter(patched):
    optimizer = create_optimizer_v2(patched, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    scale_of = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    decay_of = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for number, block in enumerate(patched.blocks):
        scales = {scale_of[id(p)] for p in block.parameters()}
        assert scales == {0.5 ** (3 - number)}
        for name, p in block.attn.named_parameters():
            assert decay_of[id(p)] == (0.1 if p.ndim > 1 else 0.0), name


def test_weights_can_be_initialised_anew_by_timm(patched, images):
    before = patched(images.float())
    torch.manual_seed(0)
    patched.init_weights("")
    after = patched(images.float())
    assert torch.isfinite(after).all()
    assert not torch.allclose(before, after)


def test_gradient_checkpointing_gives_the_same_gradients(patched, images):
    grads = []
    for enable in (False, True):
        patched.zero_grad()
        patched.train()
        patched.set_grad_checkpointing(enable)
        patched(images.float()).square().sum().backward()
        grads.append([p.grad.clone() for p in patched.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_reset_classifier_and_state_dict(patched, images, make_vit):
    patched.reset_classifier(3)
    assert patched(images.float()).shape == (2, 3)
    assert not any("original" in key for key in patched.state_dict())


def test_token_counts_come_from_a_dry_run(make_vit):
    model = make_vit(reg_tokens=4)
    names = [f"blocks.{i}.attn" for i in range(3)]
    assert count_tokens(model, names) == dict.fromkeys(names, (1, 21))
    assert input_shape(model) == (3, 16, 16)
    dynamic = make_vit(dynamic_img_size=True)
    assert count_tokens(dynamic, names, img_size=24) == dict.fromkeys(names, (1, 37))
    assert count_tokens(torch.nn.Identity(), ["nothing"]) == {}
