"""The quick check of a run: the same steps and mistakes, and nothing of it is kept."""

import os
import re
import tempfile
from pathlib import Path

import pytest

from tests.run.tiny import TINY, config, trained
from vit_tucker.cli import main, train_main
from vit_tucker.errors import ConfigError, DivergedError
from vit_tucker.run.run import run
from vit_tucker.training.quick_check import scratch_folder
from vit_tucker.training.step import OrdinaryStep

LINE = re.compile(r"quick check: all works: 2 steps \(loss ([\d.]+), ([\d.]+)\), (\d+) evaluation images, a checkpoint; "
                  r"[\d,]+ images/s; nothing was kept")  # fmt: skip


def files(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_two_steps_and_nothing_is_kept(in_tmp, capsys, monkeypatch):
    (in_tmp / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(in_tmp / "scratch"))
    status = train_main(
        ["--cfg", "digits/tucker_r16", *TINY, "attention.ranks=[3,8,8]", "--quick-check", "data.num_samples=64"]
    )
    out = capsys.readouterr().out.splitlines()
    assert status == 0
    found = LINE.fullmatch(out[-1])  # an epoch is one step here
    assert found
    assert found[3] == "64"
    assert found[1] != found[2]  # the weights moved
    assert any(line.startswith("schedule: cosine, peak lr 0.002, ") for line in out)
    assert [path.name for path in in_tmp.iterdir()] == ["scratch"]
    assert not list((in_tmp / "scratch").iterdir())


def test_an_existing_run_is_neither_read_nor_touched(in_tmp, capsys):
    given = config()
    trained(given)
    folder = in_tmp / str(given.output_dir)
    before = files(folder)
    changed = given.model_copy(update={"train": given.train.model_copy(update={"lr": 0.5})})  # else refused
    for tried in (given, changed):
        result = run(tried, quick_check=True)
        assert LINE.fullmatch(result["quick_check"])
        assert files(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    (folder / "config.yaml").write_text("nonsense")
    assert LINE.fullmatch(run(given, quick_check=True)["quick_check"])


def test_mistakes_are_found_and_leave_nothing(in_tmp, capsys):
    with pytest.raises(DivergedError, match=r"^quick check: the loss is nan at step \d: lower train.lr"):
        run(config(), quick_check=True, step_rule=WildStep())
    assert not list(in_tmp.iterdir())
    Path("file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir: .*file is a file; name another folder"):
        run(config("output_dir=file/run"), quick_check=True)
    assert [path.name for path in in_tmp.iterdir()] == ["file"]
    assert main(["train", "--cfg", "digits/dense", "data.dataset=folder", "data.root=nowhere", "--quick-check"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_folder_whose_parent_can_not_be_written_to(tmp_path):
    (tmp_path / "run").mkdir()
    tmp_path.chmod(0o500)
    try:
        with scratch_folder(tmp_path / "run") as made:
            assert not made.is_relative_to(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_the_folder_lies_where_the_run_would(tmp_path):
    with scratch_folder(tmp_path / "runs" / "x") as made:
        (made / "checkpoint").write_text("weights")
        assert made.parent == tmp_path
    assert not list(tmp_path.iterdir())


class WildStep(OrdinaryStep):
    """Leaves weights that give no finite loss."""

    def step(self, closure, trainer):
        for parameter in trainer.bare.parameters():
            parameter.data.fill_(float("nan"))
        return super().step(closure, trainer)


SWEEP = """
base: digits/base.yaml
output_dir: out
set: {model: {depth: 1, embed_dim: 32, num_heads: 4}, data: {num_samples: 64}}
start: {train: {epochs: 1}}
finetune: {train: {epochs: 1}}
cells:
- {name: tucker, attention: {method: tucker, ranks: [3, 8, 8]}}
- {name: half, attention: {method: gqa, num_kv_heads: 2}, set: {train: {mixed_precision: bf16}}}
- {name: wrong, attention: null, set: {train: {opt: adamm}}}
"""


def test_each_cell_of_a_sweep(in_tmp, capsys):
    Path("s.yaml").write_text(SWEEP)
    assert main(["sweep", "--cfg", "s.yaml", "--quick-check", "--device", "cpu"]) == 2
    out = capsys.readouterr().out.splitlines()
    shown = dict(line.split(": ", 1) for line in out if not line.startswith("train.warmup_epochs"))
    assert list(shown) == ["start", "tucker", "half", "wrong"]
    assert all(LINE.fullmatch(shown[name]) for name in ("start", "tucker", "half"))
    assert shown["wrong"].startswith("error: train.opt=adamm: ")
    assert [path.name for path in in_tmp.iterdir()] == ["s.yaml"]
