"""Whole runs on the embedded digits, in this process: files, TensorBoard, resume, EMA, refusals."""

import csv
import itertools
import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.data import resolve_data_config

import vit_tucker as vt
from tests.run.tiny import config, run, same, trained, weights
from tests.training.rules import StopAt
from vit_tucker.analysis.latency import latency_to_dense
from vit_tucker.cli import train_main
from vit_tucker.config.load import load_config
from vit_tucker.data.datasets import load_digits
from vit_tucker.data.loaders import TrainLoader
from vit_tucker.data.transforms import eval_transform
from vit_tucker.report.compare import comparison, save_comparison
from vit_tucker.run.run import run as run_shown

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_tmp")]


@torch.no_grad()
def top1_of(model: torch.nn.Module) -> float:
    """Top-1 on the digits' test set, with the transform that the model itself tells, as any timm user would."""
    transform = eval_transform(resolve_data_config({}, model=model))
    images, labels = zip(*load_digits(train=False, mode="L"), strict=True)
    assert list(model.pretrained_cfg["label_names"]) == list("0123456789")
    return (
        100
        * (model(torch.stack(list(map(transform, images)))).argmax(1) == torch.tensor(labels)).double().mean().item()
    )


def check_curves(events: EventAccumulator, results: dict) -> None:
    """TensorBoard has the loss of each step, and the scores of each epoch."""
    names = ["train/loss", "train/lr", "train/images_per_second", "eval/loss", "eval/top1", "eval/top5"]
    assert {*names, "params/attention"} <= set(events.Tags()["scalars"])
    losses = [event.value for event in events.Scalars("train/loss")]
    assert len(losses) == 2 * 5
    assert sum(losses[5:]) / 5 == pytest.approx(results["last"]["train_loss"], rel=1e-5)
    assert events.Scalars("eval/top1")[-1].value == pytest.approx(results["last"]["eval_top1"])


def test_a_run_leaves_everything_a_table_needs():
    results = run_shown(config("output_dir=a", "train.log_interval=3"))
    check_curves(EventAccumulator("a").Reload(), results)
    assert json.loads(Path("a/results.json").read_text()) == json.loads(json.dumps(results))
    rows = list(csv.DictReader(Path("a/summary.csv").read_text().splitlines()))
    assert list(rows[0]) == ["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"]
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    assert results["last"]["eval_top1"] == float(rows[1]["eval_top1"])
    assert results["best"]["top1"] == max(float(row["eval_top1"]) for row in rows)
    assert results["data"]["num_eval"] == 360
    assert load_config("a") == load_config("a/config.yaml")
    assert [{k: str(v) for k, v in row.items()} for row in results["curve"]] == rows
    cost, patch = results["cost"], results["patch"]
    assert cost["latency"] is None  # not asked for
    assert cost["dense_flops"] - cost["flops"] == patch["flops_before"] - patch["flops_after"] > 0
    attention = sum(v.numel() for k, v in weights("a").items() if ".attn." in k)
    assert results["params"]["attention"] == attention == results["patch"]["params_after"]
    assert results["params"]["total"] == sum(v.numel() for v in weights("a").values())
    assert list(Path("a").glob("events.out.tfevents.*"))
    assert "top-1" in Path("a/train.log").read_text()
    assert top1_of(vt.load("a")) == pytest.approx(results["best"]["top1"])
    assert same(vt.load("a/checkpoints/last").state_dict(), weights("a"))
    with pytest.raises(vt.ConfigError, match="nowhere: no results.json"):
        comparison([Path("nowhere")])
    save_comparison([Path("a")], Path("kept"))
    kept = Path("kept/digits-tucker_r16-0")
    assert sorted(f.name for f in kept.iterdir()) == ["config.yaml", "results.json", "summary.csv"]
    assert load_config(kept) == load_config("a")
    table = comparison([Path("a")])
    assert table in Path("kept/README.md").read_text()
    assert f"{attention:,}" in table
    assert "tucker ranks=3,8,8" in table


@pytest.mark.parametrize(
    "extra", [[], ["train.model_ema=true", "train.mixup=0.4", "train.opt=lamb"]], ids=["plain", "ema"]
)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(extra):
    """Stopped after step 7 (epoch 2, step 2), saved at step 6: the same command gives the same weights, bit for bit."""
    extra = [*extra, "train.checkpoint_steps=2", "model.drop_path_rate=0.1", "model.proj_drop_rate=0.1"]
    run(config("output_dir=whole", *extra))
    with pytest.raises(KeyboardInterrupt):
        run(config("output_dir=parts", *extra), step_rule=StopAt(7))
    assert not Path("parts/results.json").exists()
    assert json.loads(Path("parts/checkpoints/last/state.json").read_text())["progress"]["global_step"] == 6
    run(load_config("parts"))
    assert same(weights("whole"), weights("parts"))
    assert same(weights("whole", "best"), weights("parts", "best"))
    assert Path("whole/summary.csv").read_text() == Path("parts/summary.csv").read_text()
    assert not same(weights("whole"), weights("whole", "step-00000008"))


def test_another_seed_gives_another_run():
    trained(config("output_dir=a"))
    for folder, seed in (("b", 0), ("c", 1)):
        run(config(f"output_dir={folder}", f"seed={seed}"))
    assert same(weights("a"), weights("b"))
    assert not same(weights("a"), weights("c"))


def test_a_finished_run_is_evaluated_not_trained():
    first = trained(config("output_dir=a"))
    before = Path("a/results.json").read_text()
    again = run(load_config("a"))
    assert again["evaluation"]["top1"] == first["best"]["top1"]
    assert again["evaluation"]["count"] == 360
    assert Path("a/results.json").read_text() == before


def test_another_config_on_the_same_folder_is_refused():
    trained(config("output_dir=a"))
    before = {f: f.read_bytes() for f in Path("a").rglob("*") if f.is_file()}
    with pytest.raises(
        vt.ConfigError, match=r"a holds a run with another config: train.lr: 0.002 -> 0.1; choose another"
    ):
        run(config("output_dir=a", "train.lr=0.1"))
    assert {f: f.read_bytes() for f in Path("a").rglob("*") if f.is_file()} == before


def test_latency_is_measured_where_asked_for(monkeypatch):
    """At the end, and it changes nothing that was trained."""
    monkeypatch.setattr("vit_tucker.run.describe.latency_to_dense", partial(latency_to_dense, turns=3, seconds=0.01))
    without = trained(config("output_dir=a", "train.epochs=1"))
    results = run(config("output_dir=b", "train.epochs=1", "train.latency_batch_size=3"))
    assert same(weights("a"), weights("b"))
    assert results["last"] == without["last"]
    assert {k: results["cost"][k] for k in ("flops", "dense_flops")} == {
        k: without["cost"][k] for k in ("flops", "dense_flops")
    }
    latency = results["cost"]["latency"]
    assert (latency["device"], latency["batch_size"], latency["turns"]) == ("cpu", 3, 3)
    assert latency["ratio_low"] <= latency["ratio"] <= latency["ratio_high"]
    assert json.loads(Path("b/results.json").read_text())["cost"] == results["cost"]


def test_patching_a_trained_run_starts_from_its_accuracy():
    """Full-rank Tucker from the dense run's weights: the same evaluation before any training, to the last image."""
    dense = trained(config("output_dir=dense", base="digits/dense"))
    full = "attention={method: tucker, ranks: [4, 32, 32]}"
    patched = run(config("output_dir=full", "model.checkpoint=dense", full, base="digits/dense"), evaluate_only=True)
    assert patched["evaluation"]["top1"] == dense["last"]["eval_top1"]
    assert patched["evaluation"]["loss"] == pytest.approx(dense["last"]["eval_loss"], rel=1e-6)  # float32 logits
    low = "attention={method: tucker, ranks: [1, 1, 1]}"
    ruined = run(config("output_dir=low", "model.checkpoint=dense", low, base="digits/dense"), evaluate_only=True)
    assert ruined["evaluation"]["loss"] != pytest.approx(dense["last"]["eval_loss"], rel=1e-5)
    assert not Path("full").exists()


def test_a_run_does_not_need_its_start_any_more():
    """Continued and evaluated without the dense run; the report of the conversion is kept."""
    trained(config("output_dir=dense", base="digits/dense"))
    options = ["model.checkpoint=dense", "attention={method: tucker, ranks: [2, 8, 8]}"]
    first = run(config("output_dir=a", *options, base="digits/dense"))
    error = first["patch"]["layers"][0]["pre_error"]
    assert 0 < error < 1
    shutil.rmtree("dense")
    assert run(load_config("a"))["evaluation"]["top1"] == first["best"]["top1"]
    Path("a/results.json").unlink()
    shutil.rmtree("a/checkpoints/step-00000010")
    again = run(load_config("a"))
    assert again["patch"]["layers"][0]["pre_error"] == error
    assert again["last"] == first["last"]


def test_patched_checkpoints_are_no_dense_start():
    trained(config("output_dir=a", "train.epochs=1"))
    with pytest.raises(vt.CheckpointError, match=r"last/model.safetensors contains a model patched with tucker"):
        run(config("output_dir=b", "model.checkpoint=a"))
    with pytest.raises(vt.CheckpointError, match="model.checkpoint: nowhere: no such file or run folder"):
        run(config("output_dir=b", "model.checkpoint=nowhere"))
    Path("torn.safetensors").write_bytes(b"abc")
    with pytest.raises(vt.CheckpointError, match="torn.safetensors can't be read as weights"):
        run(config("output_dir=b", "model.checkpoint=torn.safetensors"))
    assert not Path("b").exists()


def test_checkpoint_of_another_shape_is_refused():
    trained(config("output_dir=dense", base="digits/dense"))
    with pytest.raises(
        vt.CheckpointError,
        match=r"model.checkpoint: dense/.* does not fit vit_tiny_patch16_224: pos_embed is \(1, 16, 32\) in the weights, "
        r"\(1, 16, 64\) in the model \(and \d+ more\); it is a ViT of 1 blocks, width 32",
    ):
        run(config("output_dir=b", "model.checkpoint=dense", "model.embed_dim=64"))


def test_data_that_ends_early_is_an_error_not_a_short_epoch(monkeypatch):
    steps = TrainLoader.steps
    monkeypatch.setattr(TrainLoader, "steps", lambda self, *position: itertools.islice(steps(self, *position), 3))
    with pytest.raises(
        vt.DataError, match="the training data ended after 3 of 5 steps of epoch 1; a streamed set needs"
    ):
        run(config("output_dir=a"))


def test_ema_mixup_accumulation_and_layer_decay_run_together():
    extra = [
        "train.mixup=0.2",
        "train.cutmix=0.5",
        "train.smoothing=0.1",
        "train.grad_accum_steps=2",
        "train.layer_decay=0.8",
    ]
    results = run(config("output_dir=a", "train.model_ema=true", "train.mixup_off_epoch=1", *extra))
    row = results["last"]
    assert math.isfinite(row["train_loss"])
    assert results["best"]["top1"] >= row["eval_ema_top1"]
    assert Path("a/checkpoints/last/ema.safetensors").is_file()
    assert same(vt.load("a/checkpoints/last").state_dict(), load_file("a/checkpoints/last/ema.safetensors"))
    assert not same(weights("a"), load_file("a/checkpoints/last/ema.safetensors"))


def test_accumulation_changes_nothing_but_rounding():
    one = run(config("output_dir=a", "train.mixup=0.2"))
    four = run(config("output_dir=b", "train.mixup=0.2", "train.grad_accum_steps=4"))
    assert four["last"]["train_loss"] == pytest.approx(one["last"]["train_loss"], rel=1e-4)  # float32, 10 steps
    assert not same(weights("a"), weights("b"))  # it did sum in another order; the roundings of the losses may cancel


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            ["model.name=vit_tiny_patch16_22"],
            vt.ConfigError,
            "model.name: timm .* has no model .*did you mean 'vit_tiny",
        ),
        (
            ["model.model_kwargs={colour: red}"],
            vt.ConfigError,
            "model: vit_tiny_patch16_224 does not accept these arguments",
        ),
        (["model.num_heads=5"], vt.ConfigError, "model: vit_tiny_patch16_224 can't be built: dim should be divisible"),
        (
            ["attention.ranks=[9, 8, 8]"],
            vt.PatchError,
            "attention: blocks.0.attn: ranks=.*head rank 9 is above its full rank 4",
        ),
        (
            ["attention.ranks={budget: 0.001}"],
            vt.PatchError,
            r"attention: ranks \{budget: 0.001, multiple_of: 8\}: too small, the smallest ranks need 0.28",
        ),
        (["attention.layers=attn"], vt.PatchError, "attention: layer pattern 'attn' matches no attention module"),
        (["train.global_batch_size=2000"], vt.ConfigError, "larger than the 320 training images"),
        (["train.warmup_epochs=9"], vt.ConfigError, "train.warmup_epochs: 9 is more than train.epochs=2"),
        (["train.opt=adamm"], vt.ConfigError, "train.opt=adamm"),
        (["data.dataset=digit"], vt.DataError, "unknown data set 'digit'.*did you mean 'digits'"),
        (
            ["data.dataset=folder"],
            vt.DataError,
            "no image folder .*; the number of classes comes from there, or from model.num",
        ),
        (["data.dataset=cifar10"], vt.DataError, "cifar10 not found"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_leaves_no_folder(overrides, error, message):
    with pytest.raises(error, match=message) as caught:
        run(config("output_dir=a", *overrides))
    assert "\n" not in str(caught.value)
    assert not Path("a").exists()


def test_one_epoch_of_a_recipe_with_a_longer_warmup(capsys):
    """Its warm-up is shortened in the log and in config.yaml; the same command, and the folder, are the same run."""
    small = ["model.depth=1", "model.embed_dim=32", "model.num_heads=4", "data.num_samples=64", "output_dir=a"]
    command = ["--cfg", "digits/dense", *small, "train.epochs=1"]
    note = "train.warmup_epochs: 3 of 30 epochs is shortened to 0.1, since train.epochs=1"
    assert train_main([*command, "--dry-run"]) == 0
    assert note in capsys.readouterr().out.splitlines()
    assert train_main(command) == 0
    assert note in Path("a/train.log").read_text()
    stored = load_config("a")
    assert (stored.train.epochs, stored.train.warmup_epochs) == (1, 0.1)
    capsys.readouterr()
    for again in (command, ["--cfg", "a"]):
        assert train_main(again) == 0
        assert "a: finished, so only evaluated" in capsys.readouterr().out
    assert (
        train_main(["--cfg", "digits/dense", *small, "train.epochs=3"]) == 2
    )  # twin: the warm-up that it has then is 3
    assert "train.warmup_epochs: 0.1 -> 3" in capsys.readouterr().err


def test_a_model_is_trained_by_its_name(capsys):
    """By the recipe of its data set, which the log names; the folder's config is one like any other."""
    small = ["model.img_size=16", "model.patch_size=4", "model.depth=1", "model.embed_dim=32", "model.num_heads=4"]
    method = ["--method", "tucker ranks=[3,8,8]"]
    assert (
        train_main(
            ["vit_tiny_patch16_224", *method, "data.dataset=digits", *small, "data.num_samples=64", "train.epochs=1"]
        )
        == 0
    )
    folder = "runs/digits-vit_tiny_patch16_224-tucker-ranks-3-8-8-0"
    log = Path(folder, "train.log").read_text()
    assert "recipe: data and train of digits/base: 1 epochs, adamw, lr 0.0015; overrides change it" in log
    assert "done: best top-1" in log
    stored, recipe = load_config(folder), load_config("digits/dense")
    assert stored.attention == vt.TuckerConfig(ranks=(3, 8, 8), init="random")
    assert (stored.data.scale, stored.train.lr) == (recipe.data.scale, recipe.train.lr)
    capsys.readouterr()
    assert train_main(["--cfg", folder, "--evaluate"]) == 0
    assert "360 images" in capsys.readouterr().out
