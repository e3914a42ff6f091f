"""What is new, left out or resampled when weights are loaded, what is refused, and what lies beside them."""

import json
import re

import pytest
import timm
import torch

import vit_tucker as vt
from tests.checkpoint import sources
from tests.checkpoint.loads import loaded, message_of
from tests.checkpoint.sources import ARGUMENTS, CLASSES, MODEL, vit
from vit_tucker.checkpoint.host_model import load_host
from vit_tucker.config.schema import ModelConfig


class TestUnfitWeightsAreRefused:
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

    def test_a_whole_model_with_other_classes_has_a_new_classifier(self, tmp_path, small_images):
        source = vit()
        torch.save(source.state_dict(), tmp_path / "w.pth")
        model, report = loaded(tmp_path / "w.pth", 3)
        assert torch.equal(model.forward_features(small_images), source.forward_features(small_images))
        assert report == "30 of 32 tensors; new: head.weight, head.bias; left out: head.weight, head.bias"

    def test_half_a_classifier_is_refused(self, tmp_path):
        state = vit().state_dict()
        del state["head.bias"]
        torch.save(state, tmp_path / "w.pth")
        assert "it has no head.bias" in message_of(tmp_path / "w.pth")

    def test_a_quantised_file(self, tmp_path):
        state = vit().state_dict()
        state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"].to(torch.int8)
        torch.save(state, tmp_path / "w.pth")
        assert "blocks.0.attn.qkv.weight is int8: a quantised checkpoint" in message_of(tmp_path / "w.pth", 3)

    def test_pooling_of_other_models(self, tmp_path, small_images):
        """A fine-tuned MAE pools its tokens: its norm has another name, and would start anew in a model that does not."""
        pooled = vit(global_pool="avg")
        torch.save(pooled.state_dict(), tmp_path / "mae_finetuned.pth")
        for classes in (CLASSES, 3):
            line = message_of(tmp_path / "mae_finetuned.pth", classes)
            assert "it has no norm.weight, norm.bias and the model has no fc_norm.weight, fc_norm.bias" in line
            assert "set model.global_pool=avg" in line
        model, _ = loaded(tmp_path / "mae_finetuned.pth", global_pool="avg")
        assert torch.equal(model(small_images), pooled(small_images))

    def test_what_the_config_itself_adds_is_new(self, tmp_path, small_images):
        source = vit()
        torch.save(source.state_dict(), tmp_path / "w.pth")
        model, report = loaded(tmp_path / "w.pth", init_values=1.0, qk_norm=True)
        torch.testing.assert_close(
            model.blocks[0].norm1(small_images.flatten(2)[..., :24]),
            source.blocks[0].norm1(small_images.flatten(2)[..., :24]),
        )
        assert report == "32 of 44 tensors; new: blocks.* (12)"
        line = message_of(tmp_path / "w.pth", init_values=1.0, depth=3)
        assert re.search(r"it has no blocks\.\* \(12\)", line), line


class TestBackbonesWithoutAClassifier:
    def test_mae_into_pooled_tokens_by_its_own_recipe(self, tmp_path, small_images):
        source = vit()
        torch.save(sources.as_mae(source.state_dict()), tmp_path / "mae.pth")
        model, report = loaded(tmp_path / "mae.pth", global_pool="avg")
        before, after = (
            source.blocks(source._pos_embed(source.patch_embed(small_images))),
            model.forward_features(small_images),
        )
        torch.testing.assert_close(after, before)  # no norm of all tokens
        assert torch.equal(model.fc_norm.weight, torch.ones(24))
        assert 1e-6 < model.head.weight.std() < 4e-5  # MAE's own start of a classifier
        assert report == (
            "28 of 32 tensors; new: fc_norm.weight, fc_norm.bias, head.weight, head.bias; left out: norm.weight, norm.bias, "
            "mask_token, decoder_pos_embed, decoder_embed.weight, decoder_blocks.0.norm1.weight, and 1 more"
        )
        model, report = loaded(tmp_path / "mae.pth")
        torch.testing.assert_close(model.forward_features(small_images), source.forward_features(small_images))
        assert report.startswith("30 of 32 tensors; new: head.weight, head.bias; left out: ")

    def test_dino_loads_its_teacher(self, tmp_path, small_images):
        source = vit()
        torch.save(sources.as_dino(source.state_dict()), tmp_path / "dino.pth")
        model, report = loaded(tmp_path / "dino.pth")
        assert torch.equal(model.forward_features(small_images), source.forward_features(small_images))
        assert report == (
            "30 of 32 tensors (names below 'backbone', entry 'teacher'); new: head.weight, head.bias; "
            "left out: head.mlp.0.weight, head.last_layer.weight_v"
        )

    def test_moco_loads_its_base_encoder(self, tmp_path, small_images):
        source = vit()
        torch.save(sources.as_moco(source.state_dict()), tmp_path / "moco.pth.tar")
        model, report = loaded(tmp_path / "moco.pth.tar")
        assert torch.equal(model.forward_features(small_images), source.forward_features(small_images))
        assert report.startswith(
            "30 of 32 tensors (names below 'module.base_encoder'); new: head.weight, head.bias; left out: "
        )

    def test_dinov2_as_its_authors_publish_it(self, tmp_path, small_images):
        source = vit("vit_small_patch14_reg4_dinov2", num_classes=0)
        torch.save(sources.as_dinov2(source), tmp_path / "dinov2.pth")
        model, report = loaded(tmp_path / "dinov2.pth", name="vit_small_patch14_reg4_dinov2")
        assert torch.equal(model.forward_features(small_images), source.forward_features(small_images))
        assert "; new: head.weight, head.bias; left out: mask_token" in report

    def test_beits_pretraining_shares_its_position_bias(self, tmp_path, small_images):
        source = vit("beit_base_patch16_224", init_values=0.1)
        with torch.no_grad():
            table = source.blocks[0].attn.relative_position_bias_table
            source.blocks[1].attn.relative_position_bias_table.copy_(table)
        torch.save(sources.as_beit_pretraining(source.state_dict()), tmp_path / "beit.pth")
        model, report = loaded(tmp_path / "beit.pth", name="beit_base_patch16_224", model_kwargs={"init_values": 0.1})
        torch.testing.assert_close(model.forward_features(small_images), source.forward_features(small_images))
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
    assert set(report.left_out) == set(state) - set(model.state_dict())
    assert "head.linear.weight" in report.left_out
    assert report.new == ()


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


def test_impossible_data_configs_beside_the_weights_are_refused(tmp_path):
    torch.save(vit().state_dict(), tmp_path / "w.pth")
    for entry in ({"mean": "grey"}, {"std": [0.0, 0.5, 0.5]}, {"crop_pct": 7}, {"interpolation": 3}):
        (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": entry}))
        line = message_of(tmp_path / "w.pth", names_file=False)
        assert f"config.json: {next(iter(entry))}: {next(iter(entry.values()))!r} is no way to prepare images" in line
