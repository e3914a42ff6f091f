"""The host of a run: timm's own checkpoint formats, resampling, adapted heads, and refusals."""

import argparse
import inspect
import json
import os

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import adapt_input_conv

import vit_tucker as vt
from vit_tucker.checkpoint.files import checkpoint_file
from vit_tucker.checkpoint.host_model import count_parameters, create_host
from vit_tucker.config.schema import ModelConfig
from vit_tucker.errors import CheckpointError

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4}


def host_config(**options):
    return ModelConfig(name="vit_tiny_patch16_224", **{**SMALL, **options})


@pytest.fixture
def source():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, in_chans=3, **SMALL)


@pytest.mark.parametrize("layout", ["safetensors", "pth", "pth with state_dict", "pth of timm's script", "folder"])
def test_checkpoints_of_timm_are_loaded(tmp_path, source, layout):
    state = source.state_dict()
    file = tmp_path / ("model.safetensors" if layout in ("safetensors", "folder") else "model.pth")
    if file.suffix == ".safetensors":
        save_file(state, str(file))
    else:
        args = argparse.Namespace(model="vit_tiny_patch16_224", lr=1e-3)
        layouts = {"pth": state, "pth with state_dict": {"state_dict": state}}
        torch.save(layouts.get(layout, {"epoch": 3, "args": args, "state_dict": state}), file)
    model = create_host(host_config(checkpoint=str(tmp_path if layout == "folder" else file)), 10, 3)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert "state_dict" not in model.pretrained_cfg


def test_a_run_folder_opens_its_last_weights(tmp_path):
    """Not its best ones, which were chosen on the evaluation images; those of the EMA where there is one."""
    files = ["best/model", "last/model", "last/ema"]
    found = []
    for name in files:
        file = tmp_path / "checkpoints" / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        found.append(checkpoint_file(tmp_path))
    assert found == [tmp_path / "checkpoints" / f"{name}.safetensors" for name in files]
    assert checkpoint_file(tmp_path / "checkpoints" / "best").parent.name == "best"


def test_position_embedding_head_and_channels_are_adapted(tmp_path, source):
    save_file(source.state_dict(), str(tmp_path / "m.safetensors"))
    config = host_config(checkpoint=str(tmp_path / "m.safetensors"), img_size=24)
    model = create_host(config, num_classes=3, in_chans=1)
    assert model.pos_embed.shape == (1, 37, 24)
    assert model.head.out_features == 3
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    summed = source.patch_embed.proj.weight.sum(1, keepdim=True)  # timm sums the colour channels
    torch.testing.assert_close(model.patch_embed.proj.weight, summed)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_are_adapted_behind_a_convolutional_stem_too(tmp_path, caplog, channels):
    """From one channel to one, without a warning of timm's that the model's usual images have three; and from one to three."""
    if channels == 3 and "base_chans" not in inspect.signature(adapt_input_conv).parameters:
        pytest.skip(f"timm {timm.__version__} adapts weights for three channels only")
    sizes = {"name": "vit_tiny_r_s16_p8_224", "img_size": 64, "depth": 1}
    one = create_host(ModelConfig(**sizes), num_classes=10, in_chans=1)
    save_file(one.state_dict(), str(tmp_path / "m.safetensors"))
    model = create_host(ModelConfig(**sizes, checkpoint=str(tmp_path / "m.safetensors")), 10, channels)
    stem, saved = (m.get_submodule("patch_embed.backbone.conv").weight for m in (model, one))
    # a grey image in three channels gives the same features
    torch.testing.assert_close(stem, saved.expand_as(stem) / channels)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_an_unknown_tag_is_refused_with_a_checkpoint_too(tmp_path, source):
    save_file(source.state_dict(), str(tmp_path / "m.safetensors"))
    config = ModelConfig(name="vit_tiny_patch16_224.nowhere", checkpoint=str(tmp_path / "m.safetensors"), **SMALL)
    with pytest.raises(CheckpointError, match="vit_tiny_patch16_224.nowhere: Invalid pretrained tag"):
        create_host(config)


def test_converted_checkpoint_keeps_the_logits(tmp_path, source):
    save_file(source.state_dict(), str(tmp_path / "m.safetensors"))
    model = create_host(host_config(checkpoint=str(tmp_path / "m.safetensors")), 10, 3).eval()
    vt.patch(model, vt.TuckerConfig(ranks=(4, 24, 24)))
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(x), source.eval()(x), rtol=1e-4, atol=1e-5)  # float32
    other = timm.create_model("vit_tiny_patch16_224", num_classes=10, **SMALL).eval()
    assert not torch.allclose(model(x), other(x), rtol=1e-2)


@pytest.mark.parametrize("way", ["checkpoint", "timm's checkpoint_path", "timm's pretrained file"])
def test_pickles_are_not_executed(tmp_path, monkeypatch, way):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("pwned").touch, ())

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # not even on request
    file = str(tmp_path / "evil.pth")
    torch.save({"state_dict": Evil()}, file)
    options, message = {
        "checkpoint": ({"checkpoint": file}, "evil.pth can't be read as weights"),
        "timm's checkpoint_path": ({"model_kwargs": {"checkpoint_path": file}}, "model: vit_tiny.* can't be built"),
        "timm's pretrained file": (
            {"pretrained": True, "model_kwargs": {"pretrained_cfg_overlay": {"file": file, "custom_load": False}}},
            "model.pretrained: no weights for vit_tiny.* could be loaded",
        ),
    }[way]
    with pytest.raises(
        (vt.CheckpointError, vt.ConfigError), match=f"{message}: it contains Python objects besides tensors"
    ) as caught:
        create_host(host_config(**options), 10, 3)
    assert "weights_only" not in str(caught.value)  # advice that nobody can follow here
    assert not (tmp_path / "pwned").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_hub_package_that_timm_cannot_use_is_named(monkeypatch):
    monkeypatch.setattr("timm.models._hub._has_hf_hub", False)  # so does an import that fails inside an older timm
    config = ModelConfig(name="vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=True)
    with pytest.raises(vt.CheckpointError, match="It is installed, but timm .* can't use it: install an older one"):
        create_host(config, 1000, 3)


def test_local_folders_of_timm(tmp_path, source):
    """A folder in the layout of timm's hub; a timm that reads none is said to."""
    save_file(source.state_dict(), str(tmp_path / "model.safetensors"))
    shape = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": SMALL}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "pretrained_cfg": {"num_classes": 10}}))
    config = ModelConfig(name=f"local-dir:{tmp_path}", pretrained=True)
    try:
        timm.models.parse_model_name(config.name)
    except AssertionError:
        with pytest.raises(vt.ConfigError, match="model.name: timm .* reads no 'local-dir:' models; name the model"):
            create_host(config, 10, 3)
        return
    model = create_host(config, 10, 3)
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)


def test_missing_pretrained_weights_are_one_line():
    config = ModelConfig(name="vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=True)
    with pytest.raises(vt.CheckpointError, match="model.pretrained: no weights for vit_tiny_patch16_224") as caught:
        create_host(config, 1000, 3)  # the test environment is offline
    assert "\n" not in str(caught.value)


def test_count_parameters(source):
    attention = sum(p.numel() for b in source.blocks for p in b.attn.parameters())
    assert count_parameters(source) == (sum(p.numel() for p in source.parameters()), attention)


def test_images_smaller_than_a_patch_are_refused():
    with pytest.raises(
        vt.ConfigError, match="^model.img_size: images of 2x2 pixels are smaller than one patch of 4x4$"
    ):
        create_host(host_config(img_size=2))
    assert create_host(host_config(img_size=4)).patch_embed.num_patches == 1
