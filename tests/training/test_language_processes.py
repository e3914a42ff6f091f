"""One and two real processes train a language model: the same windows, losses and scores."""

import csv
from pathlib import Path

import pytest
import yaml

pytest.importorskip("transformers")

from tests.run.text import TINY, write_text
from tests.training.processes import finish, saved_steps, start_all
from tests.training.rules import plugin

pytestmark = pytest.mark.slow


def train(folder: Path, processes: int, *overrides: str, status: int = 0) -> list[dict[str, str]]:
    """Rows of a run with its text beside it."""
    recipe = folder.parent / "tiny.yaml"
    write_text(folder.parent / "text", 60)
    recipe.write_text(yaml.safe_dump({**TINY, "data": {**TINY["data"], "root": str(folder.parent / "text")}}))
    log = folder.with_suffix(".log")
    arguments = ["--cfg", str(recipe), f"output_dir={folder}", "attention={method: gqa, num_kv_heads: 1}", *overrides]
    assert finish(start_all(processes, arguments, log)) == [status] * processes, log.read_text()
    if status:
        return []
    with (folder / "summary.csv").open() as opened:
        return list(csv.DictReader(opened))


def test_two_processes_train_as_one_and_go_on_where_one_stopped(tmp_path):
    one, two, parts = (tmp_path / name for name in ("one", "two", "parts"))
    expected = train(one, 1)
    rule = tmp_path / "plugin.py"
    rule.write_text(plugin("if trainer.progress.global_step == 6: os.kill(os.getpid(), signal.SIGTERM)"))
    faulty = f"plugins=[{rule}]", "train.step_rule=faulty"
    train(parts, 1, *faulty, status=130)
    assert saved_steps(parts) == 7
    rule.write_text(plugin("pass"))
    for found in (train(two, 2, "train.grad_accum_steps=2"), train(parts, 2, *faulty)):
        for a, b in zip(expected, found, strict=True):
            for key in ("train_loss", "eval_loss", "eval_perplexity", "eval_bits_per_byte"):
                assert float(b[key]) == pytest.approx(float(a[key]), rel=1e-4), key  # float32, sums in another order
            assert a["lr"] == b["lr"]
