"""Runs whose ranks are chosen by a rule, and ranks that are logged."""

import json
from pathlib import Path

import pytest

import vit_tucker as vt
from tests.run.tiny import config, run, trained, weights
from vit_tucker.config.load import load_config
from vit_tucker.report.compare import comparison
from vit_tucker.run.run import run as run_shown
from vit_tucker.storage.weights import weights_metadata

pytestmark = pytest.mark.usefixtures("in_tmp")
BUDGET = "attention.ranks={budget: 0.4, multiple_of: 4}"


def test_chosen_ranks_are_in_config_results_and_weights(monkeypatch):
    """Chosen once: the same command goes on with them, whatever the weights say by then; another budget is refused."""
    results = run(config("output_dir=a", BUDGET, "model.depth=2"))
    rules = results["config"]["attention"]["rules"]
    assert [rule["layers"] for rule in rules] == [["blocks.0.attn"], ["blocks.1.attn"]]
    assert rules == json.loads(json.dumps(load_config("a").attention.model_dump(mode="json")))["rules"]
    shapes = {k: tuple(v.shape) for k, v in weights("a").items() if k.endswith("pre_core")}
    assert shapes == {f"blocks.{i}.attn.pre_core": tuple(rules[i]["ranks"]) for i in range(2)}
    assert 0.3 < results["params"]["attention"] / results["params"]["dense_attention"] <= 0.4
    header = weights_metadata(Path("a/checkpoints/best/model.safetensors"))
    stored = vt.TuckerConfig.model_validate_json(header["attention_config"])
    assert stored.model_dump(mode="json") == results["config"]["attention"]
    assert "tucker budget=0.4 multiple_of=4" in comparison([Path("a")])
    monkeypatch.setattr("vit_tucker.patching.prepare.resolve_ranks", None)  # nothing is chosen again
    Path("a/results.json").unlink()
    again = run(config("output_dir=a", BUDGET, "model.depth=2"))
    assert again["config"] == results["config"]
    assert run(load_config("a"))["evaluation"]["top1"] == results["best"]["top1"]
    with pytest.raises(vt.ConfigError, match=r"another config: attention.ranks.budget: 0.4 -> 0.5; choose"):
        run(config("output_dir=a", BUDGET.replace("0.4", "0.5"), "model.depth=2"))


def test_ranks_are_chosen_by_calibration_images():
    dense = trained(config("output_dir=dense", base="digits/dense"))
    calibrated = [BUDGET, "model.checkpoint=dense", "attention.calibration={images: 64}"]
    short = "train.epochs=1"
    results = run(config("output_dir=a", short, *calibrated, base="digits/tucker_r16_finetune"))
    plain = run(config("output_dir=b", short, *calibrated[:2], base="digits/tucker_r16_finetune"))
    found, other = (r["config"]["attention"]["rules"][0] for r in (results, plain))
    assert (found["ranks"], found["post_ranks"]) != (other["ranks"], other["post_ranks"])
    assert results["patch"]["layers"][0]["output_error"] > 0
    assert dense["params"]["dense_attention"] * 0.4 >= results["params"]["attention"]


def test_effective_ranks_reach_tensorboard():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_shown(config("output_dir=a", "train.log_ranks=true"))
    events = EventAccumulator("a").Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("ranks/")]
    assert len(tags) == 6
    assert len(events.Scalars("ranks/pre_head/blocks.0.attn")) == 2
    assert 1 <= events.Scalars("ranks/pre_head/blocks.0.attn")[-1].value <= 3  # the head rank of the layer
    assert 1 <= events.Scalars("ranks/post_value/blocks.0.attn")[-1].value <= 8
