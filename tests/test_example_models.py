"""Models in experiments/models: a timm model of one's own, named by a config, is a host like any other."""

import pytest
import torch

import vit_tucker as vt
from vit_tucker.checkpoint.host_model import create_host
from vit_tucker.config.load import load_config
from vit_tucker.errors import ConfigError
from vit_tucker.hosts.images import input_shape
from vit_tucker.patching.patch import patch
from vit_tucker.run.model import classes_and_channels

pytestmark = pytest.mark.slow


def make(*overrides):
    config = load_config("fashion_mnist/vit_c", ["model.depth=1", *overrides])
    torch.manual_seed(0)
    return create_host(config.model, *classes_and_channels(config)).eval()


@torch.no_grad()
def test_vit_c_is_a_host():
    model = make()
    assert input_shape(model, 28) == (1, 28, 28)
    images = torch.randn(2, 1, 28, 28)
    assert model.forward_features(images).shape == (2, 16, 256)
    before = model(images)
    assert before.shape == (2, 10)
    report = patch(model, vt.TuckerConfig(ranks=(8, 256, 256)), img_size=28)
    assert report.flops_before == 16 * 2 * 4 * 256**2 + 2 * 2 * 16**2 * 256
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)  # float32, full rank
    halved = make("model.model_kwargs={stem_channels: [16, 256], stem_strides: [1, 2]}")
    assert halved.forward_features(images).shape == (2, 196, 256)
    assert not torch.allclose(halved(images), before, atol=1e-2)


@torch.no_grad()
def test_vit_c_attends_as_told_and_its_patch_too():
    for fused in (True, False):
        model = make(f"model.model_kwargs={{fused_attn: {str(fused).lower()}}}")
        assert model.blocks[0].attn.fused_attn is fused
        patch(model, vt.GQAConfig(num_kv_heads=2), img_size=28)
        assert model.blocks[0].attn.fused_attn is fused


def test_vit_c_refuses_strides_that_do_not_pair():
    with pytest.raises(
        ConfigError, match=r"vit_c can't be built: stem_channels \(16, 256\) and stem_strides .* differ"
    ):
        make("model.model_kwargs={stem_channels: [16, 256]}")


def test_a_plugin_that_is_nowhere_is_one_line():
    with pytest.raises(ConfigError, match="plugins: experiments/models/vit_d.py: no such file"):
        load_config("fashion_mnist/vit_c", ["plugins=[experiments/models/vit_d.py]"])
