"""Each layout of weights gives the logits, or the tokens, of the model that it was saved from."""

import re

import numpy as np
import pytest
import torch

from tests.checkpoint import sources
from tests.checkpoint.loads import loaded, message_of
from tests.checkpoint.sources import CLASSES, MODEL, below, vit

LAYOUTS = {
    "timm": (lambda state: state, ""),
    "timm's script": (lambda state: {"state_dict": state, "epoch": 3, "arch": "vit"}, ""),
    "timm's script with an EMA": (
        lambda state: {"state_dict": below("no.")(state), "state_dict_ema": below("module.")(state)},
        " (names below 'module', entry 'state_dict_ema')",
    ),
    "DeiT": (lambda state: {"model": state, "epoch": 3}, ""),
    "net": (lambda state: {"net": state}, " (entry 'net')"),
    "model_state_dict": (lambda state: {"model_state_dict": state}, " (entry 'model_state_dict')"),
    "Lightning": (
        lambda state: {"state_dict": {**below("model.")(state), "criterion.weight": torch.ones(CLASSES)}},
        " (names below 'model'); left out: criterion.weight",
    ),
    "DeepSpeed": (lambda state: {"module": state, "dp_world_size": 8}, " (entry 'module')"),
    "DataParallel": (below("module."), " (names below 'module')"),
    "compiled": (below("_orig_mod."), ""),
    "compiled in DataParallel": (below("module._orig_mod."), " (names below 'module')"),
    "compiled inside": (below("model._orig_mod."), " (names below 'model')"),
    "backbone": (below("backbone."), " (names below 'backbone')"),
    "teacher": (
        lambda state: {
            **below("student.backbone.")({k: v + 1 for k, v in state.items()}),
            **below("teacher.backbone.")(state),
        },
        " (names below 'teacher.backbone'); left out: student.* (32)",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrappers_and_prefixes_are_taken_off(tmp_path, small_images, layout):
    write, told = LAYOUTS[layout]
    source, file = vit(), tmp_path / "weights.pth"
    torch.save(write(source.state_dict()), file)
    model, report = loaded(file)
    assert torch.equal(model(small_images), source(small_images))
    assert report == f"32 of 32 tensors{told}"


def test_a_name_that_is_not_known_is_no_prefix(tmp_path):
    """The twin of the above: it is refused, and not loaded without these tensors."""
    torch.save(below("something.")(vit().state_dict()), tmp_path / "w.pth")
    line = message_of(tmp_path / "w.pth", 3)
    assert re.search(
        r"it has no .*and the model has no something\.\* \(32\); it is tensors named something\.cls_token", line
    )


HUGGING_FACE = {
    "ViTForImageClassification": (
        MODEL["name"],
        {},
        {},
        "32 of 32 tensors (Hugging Face transformers, names below 'vit')",
    ),
    "DeiTForImageClassificationWithTeacher": ("deit_tiny_distilled_patch16_224", {}, {}, "35 of 35 tensors"),
    "BeitForImageClassification": (
        "beit_base_patch16_224",
        {"use_relative_position_bias": True, "layer_scale_init_value": 0.1, "use_mean_pooling": True},
        {"init_values": 0.1},
        "39 of 39 tensors",
    ),
}


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_hugging_face_models_keep_their_logits(tmp_path, small_images, kind):
    name, theirs, mine, told = HUGGING_FACE[kind]
    source = sources.hugging_face(kind, **theirs)
    source.save_pretrained(tmp_path)
    model, report = loaded(tmp_path, name=name, model_kwargs=mine)
    expected = source(small_images).logits
    if isinstance(found := model(small_images), tuple):
        found = (found[0] + found[1]) / 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # float32, and 1e-12 for 1e-6 in the norms
    assert told in report
    assert "new" not in report


def test_hugging_face_backbones_keep_their_features(tmp_path, small_images):
    """DINOv2, with and without registers; its classifier sees class token and mean token, which timm's does not."""
    for kind, name in (
        ("Dinov2ForImageClassification", "vit_small_patch14_dinov2"),
        ("Dinov2WithRegistersForImageClassification", "vit_small_patch14_reg4_dinov2"),
    ):
        source = sources.hugging_face(kind, mlp_ratio=4, layerscale_value=0.1)
        source.save_pretrained(tmp_path / kind)
        model, report = loaded(tmp_path / kind, name=name)
        inner = next(iter(source.children()))
        expected = inner(small_images).last_hidden_state
        torch.testing.assert_close(model.forward_features(small_images), expected, rtol=1e-5, atol=1e-5)
        assert "; new: head.weight, head.bias; left out: mask_token, classifier.bias, classifier.weight" in report


def test_clip_of_hugging_face(tmp_path, small_images):
    """The vision tower with its projection, in timm's model of the same activation."""
    source = sources.hugging_face("CLIPVisionModelWithProjection", projection_dim=CLASSES)
    source.save_pretrained(tmp_path)
    model, report = loaded(tmp_path, name="vit_base_patch16_clip_quickgelu_224")
    torch.testing.assert_close(model(small_images), source(small_images).image_embeds, rtol=1e-5, atol=1e-5)
    assert report.startswith("33 of 33 tensors (Hugging Face CLIP")


def test_torchvisions_vit_keeps_its_logits(tmp_path, small_images):
    source = sources.torchvision_vit()
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    model, report = loaded(tmp_path / "vit.pth")
    torch.testing.assert_close(model(small_images), source(small_images), rtol=1e-5, atol=1e-5)
    assert report == "32 of 32 tensors (torchvision)"


def test_open_clip_keeps_its_features(tmp_path, small_images):
    source = vit("vit_base_patch16_clip_224")
    state = sources.as_open_clip(source.state_dict())
    with torch.no_grad():
        source.head.bias.zero_()  # a projection has none
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    model, report = loaded(tmp_path, name="vit_base_patch16_clip_224")
    assert torch.equal(model(small_images), source(small_images))
    assert message_of(tmp_path / "open_clip_pytorch_model.bin").endswith("models named *_clip_* have")  # of another ViT
    assert report == (
        "33 of 33 tensors (OpenCLIP, names below 'visual'); left out: token_embedding.weight, "
        "transformer.resblocks.0.ln_1.weight, logit_scale"
    )


@pytest.mark.parametrize("root", ["", "opt/target/"])
def test_jax_files_keep_their_logits(tmp_path, small_images, root):
    source = vit()
    np.savez(tmp_path / "vit.npz", **sources.as_jax(source, root))
    model, report = loaded(tmp_path / "vit.npz")
    assert torch.equal(model(small_images), source(small_images))
    assert report == "32 of 32 tensors (JAX)"
    other, report = loaded(tmp_path / "vit.npz", 3, img_size=24)
    assert torch.equal(other.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)
    assert other(torch.randn(1, 3, 24, 24)).isfinite().all()
    assert (
        report == f"30 of 32 tensors (JAX); new: head.weight, head.bias; left out: {root}head/kernel, {root}head/bias"
    )


def test_jax_files_of_other_models_are_refused(tmp_path):
    """timm takes the first blocks of a deeper file without a word."""
    files = {
        "deep": (
            sources.as_jax(vit(depth=3)),
            "it has 21,768 values beside classifier and embeddings, .* the model uses 14,544",
        ),
        "flat": (sources.as_jax(vit(depth=1)), r"timm can't convert it \(KeyError"),
        "in21k": (
            sources.as_jax(vit(), **{"pre_logits/kernel": np.ones((24, 24), np.float32)}),
            "its classifier needs the layer pre_logits",
        ),
    }
    for name, (arrays, expected) in files.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        assert re.search(expected, message_of(tmp_path / f"{name}.npz"))
    (tmp_path / "torn.npz").write_bytes(b"PK\3\4")
    assert "can't be read as NumPy arrays" in message_of(tmp_path / "torn.npz")
