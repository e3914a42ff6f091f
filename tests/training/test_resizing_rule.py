"""A step rule of a user's own that changes a rank in mid-run: it trains on, is saved, goes on, and is stated everywhere."""

import csv
import json
from pathlib import Path

import pytest

import vit_tucker as vt
from tests.run.tiny import config, run, same, weights
from tests.training.processes import finish, start_all
from vit_tucker.patching.patch import config_of
from vit_tucker.training.monitor import NullMonitor
from vit_tucker.training.progress import Progress

pytestmark = pytest.mark.usefixtures("in_tmp")
FILE = Path(__file__).with_name("halve_rank.py")
RULE = [f"plugins=[{FILE}]", "train.step_rule=halve_rank", "attention.ranks=[4, 8, 8]", "data.num_workers=0"]
RULE += [
    "data.num_samples=352",
    "train.global_batch_size=32",
    "train.checkpoint_steps=4",
    "train.model_ema=true",
]  # 11 steps per epoch


class StopAfterEpoch(NullMonitor):
    """Interrupts a run at the end of its first epoch, before the checkpoint of it."""

    def end_epoch(self, progress: Progress) -> None:
        raise KeyboardInterrupt


def stop(given) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(given, monitor=StopAfterEpoch())


def test_a_rule_that_halves_a_rank_trains_on_and_everything_states_it():
    results = run(config("output_dir=whole", *RULE))
    row = results["patch"]["layers"][0]
    assert row["options"].startswith("ranks=2,8,8")
    assert json.loads(Path("whole/results.json").read_text())["patch"]["layers"][0] == row
    assert results["params"]["attention"] == results["patch"]["params_after"]
    assert results["params"]["total"] == sum(v.numel() for v in weights("whole").values())
    for folder in ("whole", "whole/checkpoints/last"):
        model = vt.load(folder)
        assert model.blocks[0].attn.ranks == ((2, 8, 8), (4, 8, 8))
        assert list(config_of(model).rules[0].options["ranks"]) == [2, 8, 8]
        assert "ranks=2,8,8" in str(vt.patch_record(model).report)
    stop(
        config("output_dir=before", *RULE, "train.step_rule={name: halve_rank, after: 10}", "train.checkpoint_steps=9")
    )
    stop(config("output_dir=after", *RULE, "train.checkpoint_steps=10"))
    for folder, steps, head in (("before", 9, 4), ("after", 10, 2)):
        assert weights(folder)["blocks.0.attn.pre_core"].shape == (head, 8, 8)
        again = run(config(f"output_dir={folder}", *RULE, f"train.checkpoint_steps={steps}"))
        assert same(weights("whole"), weights(folder))
        assert again["patch"]["layers"][0]["options"] == row["options"]
        assert again["params"] == results["params"]
        assert Path(folder, "summary.csv").read_text() == Path("whole/summary.csv").read_text()
    assert run(config("output_dir=whole", *RULE))["evaluation"]["top1"] == results["best"]["top1"]


def test_two_processes_reshape_alike(tmp_path):
    given = ["--cfg", "digits/tucker_r16", "model.depth=1", "model.embed_dim=32", "model.num_heads=4", *RULE]
    given += ["train.epochs=2", "train.warmup_epochs=0.5", "train.cpu=true", "train.grad_accum_steps=2"]
    for processes, name in ((1, "one"), (2, "two")):
        log = tmp_path / f"{name}.log"
        assert finish(start_all(processes, [*given, f"output_dir={tmp_path}/{name}"], log)) == [0] * processes, (
            log.read_text()
        )
    rows = [list(csv.DictReader((tmp_path / name / "summary.csv").read_text().splitlines())) for name in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        # float32, other orders of summation
        assert float(b["train_loss"]) == pytest.approx(float(a["train_loss"]), rel=1e-4)
    assert weights(str(tmp_path / "two"))["blocks.0.attn.pre_core"].shape == (2, 8, 8)
