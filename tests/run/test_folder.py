"""A run's folder at its edges: failed starts, full disks, lost weights, tracebacks in the log, moved runs."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import vit_tucker as vt
from tests.run.tiny import config, run, same, weights
from tests.training.rules import StopAt
from vit_tucker.cli import main, train_main
from vit_tucker.config.load import load_config
from vit_tucker.report.compare import comparison
from vit_tucker.storage.run_dir import LOGGER, log_lines

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_tmp")]
SHORT = ["train.epochs=1", "data.num_samples=64", "train.cpu=true"]  # one step per epoch
FULL = Path("/dev/full")
full_disk = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full to stand for a full disk")


def short(*overrides: str, base: str = "digits/tucker_r16"):
    return config(*SHORT, *overrides, base=base)


def fail(error: Exception, *overrides: str) -> None:
    """A run whose first step raises."""
    with pytest.raises(type(error)):
        run(short(*overrides), step_rule=StopAt(0, error))


def test_a_crash_before_the_first_checkpoint_logs_its_traceback_and_accepts_the_corrected_config(capsys):
    fail(RuntimeError("out of tokens"), "output_dir=a")
    log = Path("a/train.log").read_text()
    assert "Traceback (most recent call last):" in log
    assert log.rstrip().splitlines()[-1] == "RuntimeError: out of tokens"
    assert Path("a/patch.json").is_file()
    Path("a/classes.json").write_text('{"from": 0, "before": 1}')
    Path("a/config.yaml").write_text(Path("a/config.yaml").read_text() + "unknown: key\n")  # of a plug-in, say
    capsys.readouterr()
    results = run(short("output_dir=a", base="digits/dense"))
    assert "a: an earlier start left no checkpoint, so the run begins anew" in capsys.readouterr().out
    assert results["patch"] is None
    assert not Path("a/patch.json").exists()
    assert len(json.loads(Path("a/classes.json").read_text())) == 10
    assert "out of tokens" in Path("a/train.log").read_text()  # nothing of the log is lost
    with pytest.raises(
        vt.ConfigError, match="a holds a run with another config: train.lr"
    ):  # now there is something to lose
        run(short("output_dir=a", "train.lr=0.1", base="digits/dense"))


def test_mistakes_are_a_line_in_the_log_once_the_run_has_begun():
    fail(vt.DataError("no more images"), "output_dir=a")
    log = Path("a/train.log").read_text()
    assert log.rstrip().splitlines()[-1].endswith(" error: no more images")
    assert "Traceback" not in log
    before = {file: file.read_bytes() for file in Path("a").rglob("*") if file.is_file()}
    with pytest.raises(vt.ConfigError):
        run(short("output_dir=a", "model.num_heads=5"))
    assert {file: file.read_bytes() for file in Path("a").rglob("*") if file.is_file()} == before


@full_disk
def test_a_full_disk_costs_the_metrics_with_one_warning_each_and_not_the_run(capfd):
    Path("a").mkdir()
    for name in ("train.log", ".summary.csv.tmp"):
        Path("a", name).symlink_to(FULL)
    run(short("output_dir=a", "train.epochs=2"))
    out, err = capfd.readouterr()
    for name in ("train.log", "summary.csv"):
        assert out.count(f"{name} can't be written, the run goes on: No space left on device") == 1
    assert "Traceback" not in err + out
    assert "Logging error" not in err
    run(short("output_dir=b", "train.epochs=2"))
    assert same(weights("a"), weights("b"))
    assert "can't be written" not in capfd.readouterr().out


@full_disk
@pytest.mark.parametrize("name", ["config.yaml", "results.json"])
def test_what_a_run_needs_is_one_line_and_the_same_command_goes_on(name, capsys):
    Path("a").mkdir()
    Path("a", f".{name}.tmp").symlink_to(FULL)
    command = ["--cfg", "digits/dense", "model.depth=1", *SHORT, "train.warmup_epochs=0", "output_dir=a"]
    assert train_main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    place = "a" if name == "config.yaml" else "a/results.json"
    assert line == (
        f"error: {place} can't be written to: No space left on device; free some space there, then the same command goes on"
    )
    assert not Path("a/results.json").exists()
    Path("a", f".{name}.tmp").unlink()
    assert train_main(command) == 0
    assert json.loads(Path("a/results.json").read_text())["last"]["epoch"] == 1


@full_disk
def test_output_that_can_not_be_written_is_one_line(monkeypatch, capsys):
    with FULL.open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with log_lines(True):
            LOGGER.info("a line of a run")  # is lost without a word: what the run writes counts
        assert main(["methods"]) == 1
    assert capsys.readouterr().err == "error: the output can't be written: No space left on device\n"


def test_a_run_without_best_weights_is_what_its_last_ones_are_or_refused(capfd, caplog):
    first = run(short("output_dir=a", "train.model_ema=true"))
    shutil.rmtree("a/checkpoints/best")
    again = run(load_config("a"))
    assert "a: no best weights, so those of step-" in capfd.readouterr().out
    assert again["evaluation"]["top1"] == first["last"]["eval_ema_top1"]
    assert main(["evaluate", "a", "--device", "cpu"]) == 0
    out = capfd.readouterr().out
    assert "note: a: has no best weights; these are those of step-" in caplog.text
    assert f"top-1 {first['last']['eval_ema_top1']:.2f}%" in out
    Path("a/results.json").unlink()  # killed at its very end
    assert run(load_config("a"))["best"] is None
    row = comparison([Path("a")]).splitlines()[-1]
    assert f"{first['last']['eval_top1']:.2f} | - |" in " ".join(row.split())
    assert main(["tables", "a", "--out", "t"]) == 0
    shutil.rmtree("a/checkpoints")
    capfd.readouterr()
    assert train_main(["--cfg", "a"]) == 2
    assert capfd.readouterr().err == (
        "error: a: the run is finished, but it has neither checkpoints/best nor another checkpoint any more: there is nothing "
        "to evaluate; remove the folder to train anew\n"
    )
    assert main(["evaluate", "a", "--device", "cpu"]) == 2
    results = json.loads(Path("a/results.json").read_text())
    for broken, said in (({"best": {}}, "'best.top1' is None"), ({"last": None}, "'last.eval_top1' is None")):
        Path("a/results.json").write_text(json.dumps({**results, **broken}))
        for command in (["compare", "a"], ["tables", "a", "--out", "t"]):
            capfd.readouterr()
            assert main(command) == 2
            assert f"not the results of a run: {said}, not a number" in capfd.readouterr().err


def test_a_run_finds_what_it_names_from_everywhere_and_after_a_move(monkeypatch, tmp_path, capsys):
    """The run names its start, relative to where it began; elsewhere, moved with it, and moved alone."""
    Path("project").mkdir()
    monkeypatch.chdir("project")
    run(short("output_dir=runs/dense", base="digits/dense"))
    given = ["model.checkpoint=runs/dense", "attention={method: tucker, ranks: [2, 8, 8]}"]
    first = run(short("output_dir=runs/a", *given, base="digits/dense"))
    stored = Path("runs/a/config.yaml").read_text()
    assert "checkpoint: runs/dense\n" in stored  # as it was written
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    for place in ("project", "moved"):
        if place == "moved":
            (tmp_path / "project").rename(tmp_path / "moved")
        folder = tmp_path / place / "runs" / "a"
        assert load_config(folder).model.checkpoint == str(tmp_path / place / "runs" / "dense")
        assert main(["plan", "--cfg", str(folder)]) == 0
        assert run(load_config(folder, [f"output_dir={folder}"]))["evaluation"]["top1"] == first["best"]["top1"]
    longer = run(load_config(folder, ["train.epochs=2", f"output_dir={folder}"]), allow_changes=True)
    assert longer["config"]["model"]["checkpoint"] == "runs/dense"  # as the other seeds' results have it
    assert (folder / "config.yaml").read_text() == stored.replace("epochs: 1\n", "epochs: 2\n", 1).replace(
        "output_dir: runs/a", f"output_dir: {folder}"
    )
    assert load_config(folder).model.checkpoint == str(tmp_path / "moved" / "runs" / "dense")
    folder.rename(tmp_path / "alone")
    capsys.readouterr()
    shutil.rmtree(tmp_path / "moved")
    assert main(["plan", "--cfg", str(tmp_path / "alone")]) == 2
    assert capsys.readouterr().err == (
        "error: model.checkpoint: runs/dense: no such file or run folder; name where it is now by model.checkpoint=PATH, or "
        "go without its weights by model.checkpoint=null\n"
    )
    assert main(["plan", "--cfg", str(tmp_path / "alone"), "model.checkpoint=null"]) == 0
