"""Weights as people have them: each layout gives the logits of the model that it was saved from, or a line that says why not."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import vit_tucker as vt
from tests.checkpoint import sources
from tests.checkpoint.sources import ARGUMENTS, CLASSES, MODEL, SIZE, below, vit
from vit_tucker.config.schema import ModelConfig
from vit_tucker.errors import CheckpointError
from vit_tucker.models import load_host


@pytest.fixture
def x():
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def loaded(file, num_classes=CLASSES, in_chans=None, **options):
    """The model of a file, in eval mode, and its report without the place of the file."""
    config = ModelConfig(**{**MODEL, "checkpoint": str(file), **options})
    model, report = load_host(config, num_classes, in_chans)
    return model.eval(), re.sub(r"weights: \S+: ", "", str(report))


def message_of(file, *args, **options):
    with pytest.raises(CheckpointError) as caught:
        loaded(file, *args, **options)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    return str(caught.value)


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
def test_wrappers_and_prefixes_are_taken_off(tmp_path, x, layout):
    write, told = LAYOUTS[layout]
    source, file = vit(), tmp_path / "weights.pth"
    torch.save(write(source.state_dict()), file)
    model, report = loaded(file)
    assert torch.equal(model(x), source(x))
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
def test_hugging_face_models_keep_their_logits(tmp_path, x, kind):
    name, theirs, mine, told = HUGGING_FACE[kind]
    source = sources.hugging_face(kind, **theirs)
    source.save_pretrained(tmp_path)
    model, report = loaded(tmp_path, name=name, model_kwargs=mine)
    expected = source(x).logits
    if isinstance(found := model(x), tuple):
        found = (found[0] + found[1]) / 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # float32, and 1e-12 for 1e-6 in the norms
    assert told in report
    assert "new" not in report


def test_hugging_face_backbones_keep_their_features(tmp_path, x):
    """DINOv2, with and without registers; its classifier sees class token and mean token, which timm's does not."""
    for kind, name in (
        ("Dinov2ForImageClassification", "vit_small_patch14_dinov2"),
        ("Dinov2WithRegistersForImageClassification", "vit_small_patch14_reg4_dinov2"),
    ):
        source = sources.hugging_face(kind, mlp_ratio=4, layerscale_value=0.1)
        source.save_pretrained(tmp_path / kind)
        model, report = loaded(tmp_path / kind, name=name)
        inner = next(iter(source.children()))
        expected = inner(x).last_hidden_state
        torch.testing.assert_close(model.forward_features(x), expected, rtol=1e-5, atol=1e-5)
        assert "; new: head.weight, head.bias; left out: mask_token, classifier.bias, classifier.weight" in report


def test_clip_of_hugging_face(tmp_path, x):
    """The vision tower with its projection, in timm's model of the same activation."""
    source = sources.hugging_face("CLIPVisionModelWithProjection", projection_dim=CLASSES)
    source.save_pretrained(tmp_path)
    model, report = loaded(tmp_path, name="vit_base_patch16_clip_quickgelu_224")
    torch.testing.assert_close(model(x), source(x).image_embeds, rtol=1e-5, atol=1e-5)
    assert report.startswith("33 of 33 tensors (Hugging Face CLIP")


def test_torchvisions_vit_keeps_its_logits(tmp_path, x):
    source = sources.torchvision_vit()
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    model, report = loaded(tmp_path / "vit.pth")
    torch.testing.assert_close(model(x), source(x), rtol=1e-5, atol=1e-5)
    assert report == "32 of 32 tensors (torchvision)"


def test_open_clip_keeps_its_features(tmp_path, x):
    source = vit("vit_base_patch16_clip_224")
    state = sources.as_open_clip(source.state_dict())
    with torch.no_grad():
        source.head.bias.zero_()  # a projection has none
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    model, report = loaded(tmp_path, name="vit_base_patch16_clip_224")
    assert torch.equal(model(x), source(x))
    assert message_of(tmp_path / "open_clip_pytorch_model.bin").endswith("models named *_clip_* have")  # of another ViT
    assert report == (
        "33 of 33 tensors (OpenCLIP, names below 'visual'); left out: token_embedding.weight, "
        "transformer.resblocks.0.ln_1.weight, logit_scale"
    )


@pytest.mark.parametrize("root", ["", "opt/target/"])
def test_jax_files_keep_their_logits(tmp_path, x, root):
    source = vit()
    np.savez(tmp_path / "vit.npz", **sources.as_jax(source, root))
    model, report = loaded(tmp_path / "vit.npz")
    assert torch.equal(model(x), source(x))
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
            "it has 21,768 values beside classifier and embeddings, .* the model takes 14,544",
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


def test_shards_and_folders(tmp_path, x):
    """Sharded safetensors with an index, a lone pytorch_model.bin, DeepSpeed's folder, a folder with one file of any name."""
    source = vit()
    state = source.state_dict()
    names = sorted(state)
    halves = {"model-00001-of-00002.safetensors": names[:10], "model-00002-of-00002.safetensors": names[10:]}
    (tmp_path / "shards").mkdir()
    for name, keys in halves.items():
        save_file({key: state[key].contiguous() for key in keys}, str(tmp_path / "shards" / name))
    weight_map = {key: name for name, keys in halves.items() for key in keys}
    (tmp_path / "shards/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "bin").mkdir()
    torch.save(state, tmp_path / "bin/pytorch_model.bin")
    (tmp_path / "deepspeed/global_step7").mkdir(parents=True)
    (tmp_path / "deepspeed/latest").write_text("global_step7")
    torch.save({"module": state}, tmp_path / "deepspeed/global_step7/mp_rank_00_model_states.pt")
    (tmp_path / "one").mkdir()
    torch.save(state, tmp_path / "one/epoch=3.ckpt")
    for folder in ("shards", "bin", "deepspeed", "one"):
        model, _ = loaded(tmp_path / folder)
        assert torch.equal(model(x), source(x)), folder
    (tmp_path / "shards/model-00002-of-00002.safetensors").unlink()
    assert "lists 2 shards, of which model-00002-of-00002.safetensors is missing" in message_of(tmp_path / "shards")
    torch.save(state, tmp_path / "one/epoch=4.ckpt")
    assert "has 2 weights files (epoch=3.ckpt, epoch=4.ckpt): name one of them" in message_of(tmp_path / "one")


def test_what_a_file_is_instead_of_weights(tmp_path):
    file = tmp_path / "w.pth"
    contents = {
        b"": r"w.pth is empty \(0 bytes\)",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1": "a Git LFS pointer .* git lfs pull",
        b"<!DOCTYPE html><html>": "a web page and not weights",
        b"\x80\x02garbage": "can't be read as weights: ",
    }
    for content, expected in contents.items():
        file.write_bytes(content)
        line = message_of(file)
        assert re.search(expected, line), line
        assert "weights_only" not in line
    for values, expected in (
        ({}, "holds no tensors: it is an empty mapping"),
        ({"state_dict": {}}, r"holds no tensors: it holds state_dict \(a dict of 0 entries\)"),
        ({"state_dict_ema": {}, "epoch": 3}, "holds no tensors: it holds state_dict_ema"),
        ([1, 2], "holds no tensors: it is a list"),
    ):
        torch.save(values, file)
        assert re.search(expected, message_of(file))
    torch.save({"optimizer": {"state": {0: torch.ones(2)}}, "epoch": 3}, file)
    assert "holds no tensors: it holds optimizer (a dict of 1 entries), epoch (a int)" in message_of(file)
    (tmp_path / "w.onnx").write_bytes(b"\x08\x07")
    assert "w.onnx is an ONNX file; supported are safetensors" in message_of(tmp_path / "w.onnx")


class TestNothingIsRandomWithoutAWord:
    """With another number of classes timm loads what fits; here only the classifier may be new."""

    def test_other_models(self, tmp_path):
        torch.save(vit(depth=1).state_dict(), tmp_path / "shallow.pth")
        line = message_of(tmp_path / "shallow.pth", 3)
        assert re.search(
            r"does not fit vit_tiny_patch16_224: it has no blocks\.\* \(12\); it is a ViT of 1 blocks, width 24", line
        )
        torch.save(vit(depth=3).state_dict(), tmp_path / "deep.pth")
        assert "the model has no blocks.* (12); it is a ViT of 3 blocks" in message_of(tmp_path / "deep.pth", 3)
        resnet = timm.create_model("resnet18", num_classes=2).state_dict()
        torch.save(resnet, tmp_path / "resnet.pth")
        assert message_of(tmp_path / "resnet.pth", 3).endswith("it is a ResNet")

    def test_a_whole_model_with_other_classes_has_a_new_classifier(self, tmp_path, x):
        source = vit()
        torch.save(source.state_dict(), tmp_path / "w.pth")
        model, report = loaded(tmp_path / "w.pth", 3)
        assert torch.equal(model.forward_features(x), source.forward_features(x))
        assert report == "30 of 32 tensors; new: head.weight, head.bias; left out: head.weight, head.bias"

    def test_half_a_classifier_is_none(self, tmp_path):
        state = vit().state_dict()
        del state["head.bias"]
        torch.save(state, tmp_path / "w.pth")
        assert "it has no head.bias" in message_of(tmp_path / "w.pth")

    def test_a_quantised_file(self, tmp_path):
        state = vit().state_dict()
        state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"].to(torch.int8)
        torch.save(state, tmp_path / "w.pth")
        assert "blocks.0.attn.qkv.weight is int8: a quantised checkpoint" in message_of(tmp_path / "w.pth", 3)

    def test_pooling_of_other_models(self, tmp_path, x):
        """A fine-tuned MAE pools its tokens: its norm has another name, and would start anew in a model that does not."""
        pooled = vit(global_pool="avg")
        torch.save(pooled.state_dict(), tmp_path / "mae_finetuned.pth")
        for classes in (CLASSES, 3):
            line = message_of(tmp_path / "mae_finetuned.pth", classes)
            assert "it has no norm.weight, norm.bias and the model has no fc_norm.weight, fc_norm.bias" in line
            assert "set model.global_pool=avg" in line
        model, _ = loaded(tmp_path / "mae_finetuned.pth", global_pool="avg")
        assert torch.equal(model(x), pooled(x))

    def test_what_the_config_itself_adds_is_new(self, tmp_path, x):
        source = vit()
        torch.save(source.state_dict(), tmp_path / "w.pth")
        model, report = loaded(tmp_path / "w.pth", init_values=1.0, qk_norm=True)
        torch.testing.assert_close(
            model.blocks[0].norm1(x.flatten(2)[..., :24]), source.blocks[0].norm1(x.flatten(2)[..., :24])
        )
        assert report == "32 of 44 tensors; new: blocks.* (12)"
        line = message_of(tmp_path / "w.pth", init_values=1.0, depth=3)
        assert re.search(r"it has no blocks\.\* \(12\)", line), line


class TestBackbonesWithoutAClassifier:
    def test_mae_into_pooled_tokens_by_its_own_recipe(self, tmp_path, x):
        source = vit()
        torch.save(sources.as_mae(source.state_dict()), tmp_path / "mae.pth")
        model, report = loaded(tmp_path / "mae.pth", global_pool="avg")
        before, after = source.blocks(source._pos_embed(source.patch_embed(x))), model.forward_features(x)
        torch.testing.assert_close(after, before)  # no norm of all tokens
        assert torch.equal(model.fc_norm.weight, torch.ones(24))
        assert 1e-6 < model.head.weight.std() < 4e-5  # MAE's own start of a classifier
        assert report == (
            "28 of 32 tensors; new: fc_norm.weight, fc_norm.bias, head.weight, head.bias; left out: norm.weight, norm.bias, "
            "mask_token, decoder_pos_embed, decoder_embed.weight, decoder_blocks.0.norm1.weight, and 1 more"
        )
        model, report = loaded(tmp_path / "mae.pth")
        torch.testing.assert_close(model.forward_features(x), source.forward_features(x))
        assert report.startswith("30 of 32 tensors; new: head.weight, head.bias; left out: ")

    def test_dino_means_its_teacher(self, tmp_path, x):
        source = vit()
        torch.save(sources.as_dino(source.state_dict()), tmp_path / "dino.pth")
        model, report = loaded(tmp_path / "dino.pth")
        assert torch.equal(model.forward_features(x), source.forward_features(x))
        assert report == (
            "30 of 32 tensors (names below 'backbone', entry 'teacher'); new: head.weight, head.bias; "
            "left out: head.mlp.0.weight, head.last_layer.weight_v"
        )

    def test_moco_means_its_base_encoder(self, tmp_path, x):
        source = vit()
        torch.save(sources.as_moco(source.state_dict()), tmp_path / "moco.pth.tar")
        model, report = loaded(tmp_path / "moco.pth.tar")
        assert torch.equal(model.forward_features(x), source.forward_features(x))
        assert report.startswith(
            "30 of 32 tensors (names below 'module.base_encoder'); new: head.weight, head.bias; left out: "
        )

    def test_dinov2_as_its_authors_publish_it(self, tmp_path, x):
        source = vit("vit_small_patch14_reg4_dinov2", num_classes=0)
        torch.save(sources.as_dinov2(source), tmp_path / "dinov2.pth")
        model, report = loaded(tmp_path / "dinov2.pth", name="vit_small_patch14_reg4_dinov2")
        assert torch.equal(model.forward_features(x), source.forward_features(x))
        assert "; new: head.weight, head.bias; left out: mask_token" in report

    def test_beits_pretraining_shares_its_position_bias(self, tmp_path, x):
        source = vit("beit_base_patch16_224", init_values=0.1)
        with torch.no_grad():
            table = source.blocks[0].attn.relative_position_bias_table
            source.blocks[1].attn.relative_position_bias_table.copy_(table)
        torch.save(sources.as_beit_pretraining(source.state_dict()), tmp_path / "beit.pth")
        model, report = loaded(tmp_path / "beit.pth", name="beit_base_patch16_224", model_kwargs={"init_values": 0.1})
        torch.testing.assert_close(model.forward_features(x), source.forward_features(x))
        assert "BEiT pretraining, its shared position bias copied to each block" in report
        assert "new: fc_norm.weight, fc_norm.bias, head.weight, head.bias" in report

    def test_a_plan_needs_no_classifier(self, tmp_path):
        torch.save(sources.as_mae(vit().state_dict()), tmp_path / "mae.pth")
        model, report = loaded(tmp_path / "mae.pth", None)
        assert model.num_classes == 0
        assert report.startswith("30 of 30 tensors; left out: ")


def test_classifiers_with_a_norm_of_their_own_are_not_needed(tmp_path):
    state = timm.create_model("levit_128s", num_classes=2).state_dict()
    torch.save(state, tmp_path / "levit.pth")
    model, report = load_host(ModelConfig(name="levit_128s", checkpoint=str(tmp_path / "levit.pth")), 0)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert str(report).endswith("311 of 311 tensors; left out: head.* (7), head_dist.* (7)")


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_resampled_is_named(tmp_path, channels):
    """From images of 32 pixels in patches of 8 to 24 in patches of 4; from three channels to one, or as they are."""
    torch.save(vit(img_size=32, patch_size=8).state_dict(), tmp_path / "w.pth")
    model, report = loaded(tmp_path / "w.pth", in_chans=channels, img_size=24, patch_size=4)
    assert model.patch_embed.proj.weight.shape == (24, channels, 4, 4)
    embedding = "patch_embed.proj.weight 8x8 -> 4x4" if channels == 3 else "patch_embed.proj.weight 3 -> 1 channels"
    assert report == f"32 of 32 tensors; resampled: pos_embed 4x4 -> 6x6, {embedding}"


def test_what_lies_beside_the_weights_says_how_images_are_prepared(tmp_path):
    source = vit()
    vt.save(source, tmp_path / "timm", label_names=list("abcde"), data={"mean": (0.1,) * 3, "crop_pct": 0.7})
    model, _ = loaded(tmp_path / "timm")
    cfg = model.pretrained_cfg
    assert (cfg["mean"], cfg["crop_pct"], cfg["label_names"]) == ((0.1,) * 3, 0.7, tuple("abcde"))
    hugging_face = sources.hugging_face("ViTForImageClassification", id2label=dict(enumerate("vwxyz")))
    hugging_face.save_pretrained(tmp_path / "hf")
    processor = {
        "image_mean": [0.2] * 3,
        "image_std": [0.3] * 3,
        "resample": 3,
        "do_center_crop": True,
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 28, "width": 28},
    }
    (tmp_path / "hf/preprocessor_config.json").write_text(json.dumps(processor))
    cfg = loaded(tmp_path / "hf")[0].pretrained_cfg
    assert (cfg["mean"], cfg["std"], cfg["interpolation"], cfg["crop_pct"]) == (
        (0.2,) * 3,
        (0.3,) * 3,
        "bicubic",
        0.875,
    )
    assert cfg["label_names"] == tuple("vwxyz")
    default = timm.create_model(MODEL["name"], **ARGUMENTS).pretrained_cfg
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    assert loaded(tmp_path / "bare.pth")[0].pretrained_cfg["mean"] == default["mean"]
