"""The ranks of stored models: of runs and saved folders, dense and with a method's layers, and what they refuse."""

import json
from pathlib import Path

import pytest

from vit_tucker.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_tmp")]


def ranks_of(capsys, *arguments) -> tuple[dict, str]:
    """Runs the command with --json; returns its values and what it printed on standard error."""
    assert main(["ranks", *map(str, arguments), "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def by_mode(values: dict) -> dict[tuple[str, str], set[int]]:
    """Numerical ranks of all layers by tensor and mode."""
    found: dict[tuple[str, str], set[int]] = {}
    for row in values["ranks"]:
        if not row["whitened"]:
            found.setdefault((row["tensor"], row["mode"]), set()).add(row["numerical_rank"])
    return found


def test_a_patched_runs_ranks_are_those_of_its_method(run_folder, capsys):
    values, _ = ranks_of(capsys, run_folder)
    ranks = by_mode(values)
    options = json.loads((run_folder / "results.json").read_text())["patch"]["layers"][0]["options"]
    assert options == "ranks=3,8,8"
    assert [max(ranks["pre", mode]) for mode in ("head", "query", "key")] == [3, 8, 8]
    assert max(ranks["post", "value"]) == 8
    assert Path(values["folder"]).is_relative_to("runs")
    assert (Path(values["folder"]) / "spectra.png").is_file()


def test_a_dense_runs_ranks_are_full_and_whitened_by_its_images(dense_folder, capsys):
    values, _ = ranks_of(capsys, dense_folder, "--data", "digits", "--images", "64", "--out", "out", "--device", "cpu")
    assert {row["whitened"] for row in values["ranks"]} == {False, True}
    assert min(by_mode(values)["pre", "query"]) > 8
    assert sorted(Path(file).name for file in values["figures"]) == ["spectra.png", "spectra_whitened.png"]


def test_replaced_attention_has_no_whitened_spectra(run_folder, capsys):
    values, err = ranks_of(capsys, run_folder, "--data", "digits", "--images", "64", "--out", "out")
    assert "no whitened spectra" in err
    assert len(values["figures"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--random"], "--random is for timm model names"),
        (["--checkpoint", "x"], "--checkpoint is for timm model names"),
        (["data.root=x"], "data.root=x: there are no data without --data"),
        (["--data", "digits", "model.depth=2"], "model.depth=2: only keys of the data section"),
        (["--data", "digitz"], "did you mean 'digits'?"),
        (["--device", "gpu"], "--device gpu: one of cpu, cuda, mps, xpu"),
    ],
)
def test_what_does_not_fit_is_one_line(dense_folder, capsys, arguments, message):
    assert main(["ranks", str(dense_folder), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1
    assert not Path("runs").exists()


def test_what_is_not_there_is_one_line(capsys):
    Path("empty").mkdir()
    for where in ("empty", "runs/none"):
        assert main(["ranks", where]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
