"""Runs, plans and teachers that start from weights from elsewhere: what they say, keep and refuse."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from timm.models._hub import has_hf_hub

import vit_tucker as vt
from tests.checkpoint import sources
from tests.checkpoint.sources import MODEL, vit
from tests.run.tiny import run
from vit_tucker.checkpoint.host_model import load_host
from vit_tucker.cli import main
from vit_tucker.config.load import load_config
from vit_tucker.config.schema import ModelConfig
from vit_tucker.errors import CheckpointError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_tmp")]

RECIPE = ["train.epochs=1", "train.warmup_epochs=0", "train.global_batch_size=64", "data.num_samples=128", "seed=3"]
SIZES = [f"model.{key}={value}" for key, value in MODEL.items() if key != "name"]
SIZES += ["model.in_chans=1", "model.class_token=true", "model.global_pool=token", "model.mlp_ratio=4"]


def config(*overrides, base="digits/dense"):
    return load_config(base, [*RECIPE, *SIZES, *overrides])


def published(file, depth=2, **options):
    """A ViT of five classes on grey images, as a file that names nothing but its tensors."""
    torch.save(vit(in_chans=1, depth=depth, **options).state_dict(), file)
    return str(file)


def test_the_log_has_what_was_loaded_and_how_images_are_prepared():
    torch.save(sources.as_mae(vit(in_chans=1).state_dict()), "mae.pth")
    run(config("output_dir=a", "model.checkpoint=mae.pth", "model.global_pool=avg"))
    log = Path("a/train.log").read_text()
    assert (
        "weights: mae.pth: 28 of 32 tensors; new: fc_norm.weight, fc_norm.bias, head.weight, head.bias; left out: "
        in log
    )
    assert (
        "images: 1 x 16 x 16, mean (0.5), std (0.5) of timm's vit_tiny_patch16_224 (nothing beside mae.pth names them)"
        in log
    )
    run(config("output_dir=b"))
    log = Path("b/train.log").read_text()
    assert "weights:" not in log
    assert "mean (0.3055), std (0.376) of the data set" in log


def test_the_weights_own_normalisation_is_the_runs_and_stays_it_when_they_are_gone():
    """So it is with local-dir: names; a saved folder or a run as model.checkpoint is the same model."""
    vt.save(vit(in_chans=1), "start", data={"mean": (0.2,), "std": (0.4,), "crop_pct": 0.8})
    start = ["output_dir=a", "model.checkpoint=start", "data.crop_pct=null", "train.epochs=2"]
    first = run(config(*start))
    assert "mean (0.2), std (0.4) of start/model.safetensors" in Path("a/train.log").read_text()
    expected = {"mean": (0.2,), "std": (0.4,), "crop_pct": 0.8}
    assert {key: first["data"][key] for key in expected} == expected
    assert json.loads(Path("a/data_config.json").read_text())["mean"] == [0.2]
    shutil.rmtree("start")
    again = run(config(*start))  # only evaluated
    assert {
        key: tuple(value) if isinstance(value := again["data"][key], list) else value for key in expected
    } == expected
    assert again["evaluation"]["top1"] == pytest.approx(first["best"]["top1"])
    Path("a/data_config.json").unlink()  # as in the folder of an older version
    older = run(config(*start))
    assert older["data"]["mean"] == (0.2,)
    chosen = run(config("output_dir=b", "model.checkpoint=a", "data.mean=[0.7]", "train.epochs=1"))
    assert (chosen["data"]["mean"], chosen["data"]["std"]) == ((0.7,), (0.4,))


COMMANDS = {
    "train": ["train", "--cfg", "digits/dense", *RECIPE, *SIZES, "model.checkpoint=shallow.pth", "output_dir=out"],
    "dry run": [
        "train",
        "--cfg",
        "digits/dense",
        *SIZES,
        "model.checkpoint=shallow.pth",
        "output_dir=out",
        "--dry-run",
    ],
    "plan": ["plan", MODEL["name"], "--method", "gqa num_kv_heads=1", *SIZES, "model.checkpoint=shallow.pth"],
    "convert": [
        *("convert", MODEL["name"], "--method", "gqa num_kv_heads=1", "--out", "out"),
        *(*SIZES, "model.checkpoint=shallow.pth", "model.num_classes=3"),
    ],
    "ranks": ["ranks", MODEL["name"], "--checkpoint", "shallow.pth", *SIZES, "--out", "out"],
}


class TestRefusedBeforeTheFirstStep:
    """A file of one block in a model of two: with another number of classes timm would leave a block as it was initialised."""

    @pytest.mark.parametrize("command", COMMANDS)
    def test_commands(self, capsys, command):
        published("shallow.pth", depth=1)
        assert main(COMMANDS[command]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert "model.checkpoint: shallow.pth does not fit vit_tiny_patch16_224: it has no blocks.* (12)" in lines[0]
        assert "it is a ViT of 1 blocks, width 24, patches of 4 pixels, 1 channels and 5 classes" in lines[0]
        assert not Path("out").exists()

    @pytest.mark.skipif(not has_hf_hub(), reason="this timm can't use the hub's package")
    def test_timms_own_weights_and_its_folders(self, monkeypatch):
        state = vit(depth=1, num_classes=1000).state_dict()
        monkeypatch.setattr("vit_tucker.checkpoint.hub.unreachable", lambda: None)
        monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **options: dict(state))
        pretrained = ModelConfig(**MODEL, pretrained=True)
        with pytest.raises(CheckpointError, match=r"the weights of vit_tiny.* do not fit: it has no blocks\.\* \(12\)"):
            load_host(pretrained, 3)
        model, report = load_host(pretrained.model_copy(update={"depth": 1}), 3)
        assert torch.equal(model.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])
        assert str(report).startswith(
            "weights: timm's vit_tiny_patch16_224: 18 of 20 tensors; new: head.weight, head.bias"
        )

    def test_an_empty_file_is_no_reason_to_ask_the_hub(self):
        torch.save({"state_dict": {}}, "empty.pth")
        with pytest.raises(CheckpointError, match="empty.pth contains no tensors"):
            run(config("output_dir=out", "model.checkpoint=empty.pth"))

    def test_a_class_token_too_many(self):
        published("w.pth")
        with pytest.raises(
            CheckpointError, match=r"does not fit .*: .*the model has no cls_token, .*; timm can't adapt it"
        ):
            run(config("output_dir=out", "model.checkpoint=w.pth", "model.class_token=false", "model.global_pool=avg"))

    def test_models_that_ignore_weights(self):
        @timm.models.register_model
        def vit_tucker_test_without_weights(pretrained=False, **options):
            return timm.create_model("vit_tiny_patch16_224", **options)

        published("w.pth")
        ignoring = {**MODEL, "name": "vit_tucker_test_without_weights", "in_chans": 1}
        for options in ({"checkpoint": "w.pth"}, {"pretrained": True}):
            with pytest.raises(CheckpointError, match="is made by a function that loads no weights"):
                load_host(ModelConfig(**ignoring, **options), 3)


def test_commands_print_what_they_loaded(capsys):
    published("w.pth")
    assert main(["plan", MODEL["name"], "--method", "gqa num_kv_heads=1", *SIZES, "model.checkpoint=w.pth"]) == 0
    assert capsys.readouterr().err == "note: weights: w.pth: 32 of 32 tensors\n"  # and five classes, as the file has
    assert main(["ranks", MODEL["name"], "--checkpoint", "w.pth", *SIZES, "--out", "out"]) == 0
    assert "weights: w.pth: 30 of 30 tensors; left out: head.weight, head.bias" in capsys.readouterr().err


class TestTeachers:
    def test_a_classifier_of_other_classes_teaches_nothing(self):
        published("five.pth")
        for overrides in (["train.distill.teacher=five.pth"], ["train.distill={}", "model.checkpoint=five.pth"]):
            with pytest.raises(
                CheckpointError, match="train.distill.teacher: five.pth has no classifier of these 10 classes"
            ):
                run(config("output_dir=out", *overrides), dry_run=True)
        features = ["train.distill={alpha: 0, features: 1}", "model.checkpoint=five.pth"]
        run(config("output_dir=out", *features), dry_run=True)  # needs no classifier

    def test_its_weights_are_reported_too(self):
        published("ten.pth", num_classes=10)
        results = run(config("output_dir=out", "train.distill.teacher=ten.pth"))
        assert results["epochs"] == 1
        assert "weights: ten.pth: 32 of 32 tensors" in Path("out/train.log").read_text()

    def test_the_same_classes_in_another_order_teach_nothing(self):
        vt.save(vit(in_chans=1, num_classes=10), "reversed", label_names=list("9876543210"))
        with pytest.raises(CheckpointError, match="another order: class 0 is '9' there and '0' in the data set"):
            run(config("output_dir=out", "train.distill.teacher=reversed"), dry_run=True)
        vt.save(vit(in_chans=1, num_classes=10), "teacher", label_names=list("0123456789"))
        run(config("output_dir=out", "train.distill.teacher=teacher"), dry_run=True)
