"""Everything that is written, and the report over it."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from tests.report.synthetic import run_results, study, write_runs
from vit_tucker.errors import ConfigError
from vit_tucker.report import ablation_figures, ablations
from vit_tucker.report import study as study_module
from vit_tucker.report.matched import compare_methods
from vit_tucker.report.report import write_report
from vit_tucker.report.sections import sections
from vit_tucker.report.study import write_study
from vit_tucker.report.verdicts import verdicts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SWEEP = "title: Accuracy over parameters\nabout: |\n  Does Tucker\n  need fewer?\noutput_dir: runs/fig3\n"


@pytest.fixture
def no_figures(monkeypatch):
    """Tables alone: figures are what takes time. Of ablations there is an empty file under the figure's name."""

    def empty(option, lines, folder):
        file = folder / f"{ablations.stem_of(option)}.png"
        file.touch()
        return file.name

    monkeypatch.setattr(study_module, "draw_accuracy", lambda *_: (None, []))
    monkeypatch.setattr(study_module, "draw_curves", lambda *_: None)
    monkeypatch.setattr(ablation_figures, "draw_ablation", empty)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr("vit_tucker.report.stats.RESAMPLES", 400)


def test_all_files_are_written_and_their_pictures_can_be_read(tmp_path):
    from matplotlib.image import imread

    write_runs(tmp_path / "runs", study(seeds=2, methods=("tucker", "gqa")))
    (tmp_path / "runs" / "sweep.yaml").write_text(SWEEP)
    out = tmp_path / "kept"
    write_study([tmp_path / "runs"], out)
    text = (out / "tables.md").read_text()
    assert text.startswith("# Accuracy over parameters\n\nDoes Tucker need fewer?\n")
    pictures = re.findall(r"\]\((.*?\.png)\)", text)
    assert "accuracy_params.png" in pictures
    assert "curves.png" in pictures
    for picture in pictures:
        image = imread(out / picture)
        assert image.shape[0] > 500
        assert image[..., :3].std() > 0.05  # not blank
        assert (out / picture).with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    for stem in ("settings", "matched", "headline", "recovery"):
        assert (out / f"{stem}.csv").read_text().count("\n") > 1
        assert r"\toprule" in (out / f"{stem}.tex").read_text()
    assert (out / "sweep.yaml").read_text() == SWEEP


def test_a_kept_folder_makes_itself_anew(tmp_path, no_figures):
    write_runs(tmp_path / "runs", study(seeds=2))
    out, moved = tmp_path / "kept", tmp_path / "moved" / "kept"
    write_study([tmp_path / "runs"], out)
    names = sorted(file.name for file in out.iterdir())
    moved.mkdir(parents=True)
    shutil.copyfile(out / "results.jsonl", moved / "results.jsonl")
    write_study([moved], moved)
    assert sorted(file.name for file in moved.iterdir()) == names
    for name in names:
        assert (moved / name).read_bytes() == (out / name).read_bytes()


def test_hosts_and_data_sets_are_never_mixed(tmp_path, no_figures):
    other = [
        run_results(r["name"], r["config"]["attention"], 9, 50.0, **{"config.data.dataset": "cifar10"})
        for r in study(1)
    ]
    write_runs(tmp_path / "a", study(seeds=2))
    write_runs(tmp_path / "b", other)
    outputs = write_study([tmp_path / "a", tmp_path / "b"], tmp_path / "out").outputs
    assert [output.folder for output in outputs] == [
        "vit_tiny_patch16_224_on_cifar10",
        "vit_tiny_patch16_224_on_digits",
    ]
    settings = [(tmp_path / "out" / output.folder / "settings.csv").read_text() for output in outputs]
    assert "50.0" in settings[0]
    assert "50.0" not in settings[1]


def test_images_are_those_that_the_recipe_trained_on(tmp_path, no_figures):
    runs = study(seeds=1)
    for run in runs:
        run["num_train"] = 60_000 if run["name"] == "start" else 40_000
    assert runs[0]["name"] == "start"
    write_study([write_runs(tmp_path / "runs", runs)], tmp_path / "out")
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "40000 training and 360 evaluation images" in text
    assert "60000" not in text


def test_one_epoch_makes_no_curves(tmp_path, no_figures):
    runs = study(seeds=1)
    for run in runs:
        run["curve"] = run["curve"][-1:]
    (output,) = write_study([write_runs(tmp_path / "one", runs)], tmp_path / "out").outputs
    assert "Training" not in output.parts
    assert output.notes == [
        "No training curves, nor epochs to recover: no setting was evaluated after more than one epoch."
    ]
    assert not [file.name for file in (tmp_path / "out").iterdir() if file.name.startswith(("curves", "recovery"))]
    (output,) = write_study([write_runs(tmp_path / "eight", study(seeds=1))], tmp_path / "out").outputs
    assert output.parts["Training"].table is not None
    assert not output.notes


def test_mistakes_change_nothing(tmp_path, no_figures):
    write_runs(tmp_path / "runs", study(seeds=1))
    out = tmp_path / "out"
    for options, patterns, message in ((["train.l"], [], "did you mean 'train.lr'"), ([], ["x*"], "--curves x\\*")):
        with pytest.raises(ConfigError, match=message):
            write_study([tmp_path / "runs"], out, options, patterns)
    (tmp_path / "runs" / "sweep.yaml").write_text("title: [")
    with pytest.raises(ConfigError, match="sweep.yaml: not valid YAML"):
        write_study([tmp_path / "runs"], out)
    assert not out.exists()
    with pytest.raises(ConfigError, match="has a results.jsonl"):
        write_report(tmp_path)


def test_options_that_do_not_vary_alone_are_said(tmp_path, no_figures):
    write_runs(tmp_path / "runs", study(seeds=1))
    (output,) = write_study([tmp_path / "runs"], tmp_path / "out", ["train.lr"]).outputs
    assert output.notes == ["No two settings differ in train.lr alone."]


def judged(runs):
    (section,) = sections(runs)
    return "\n".join(verdicts(compare_methods(section)))


def test_verdicts_follow_the_numbers():
    text = judged(study(noise=0.02))
    assert "**Fewer parameters than GQA: holds** at 3 of 4" in text
    assert "**Fewer parameters than GQA: inconclusive** at 1 of 4" in text  # its smallest setting is better already
    assert "**Almost an order of magnitude fewer than MLA: does not hold**" in text  # 3 times
    assert "**At dense accuracy, fewer than MLA: inconclusive**: no setting of either is" in text
    swapped = study(noise=0.02)  # Tucker with the parameters of GQA, ten times as many
    for run in swapped:
        attention = run["config"]["attention"]
        run["params"]["attention"] *= 10 if attention and attention["method"] == "tucker" else 1
    assert "does not hold** at 3 of 4" in judged(swapped).partition("Fewer parameters than MLA")[2]
    assert "holds** at" not in judged(swapped)
    single = judged(study(seeds=1, noise=0.02))
    assert "holds** at" not in single
    assert "some settings have one seed" in single


def test_the_report_has_each_study_with_its_verdicts_and_command(tmp_path, no_figures, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_runs(Path("runs/fig3"), study(seeds=3))
    Path("runs/fig3/sweep.yaml").write_text(SWEEP)
    write_study([Path("runs/fig3")], Path("results/fig3"))
    Path("results/fig3/tables.md").unlink()
    Path("results/single").mkdir()
    Path("results/single/README.md").write_text("# single\n")
    text = write_report(Path("results")).read_text()
    assert Path("results/fig3/tables.md").is_file()
    assert "## Accuracy over parameters\n\nDoes Tucker need fewer?\n" in text
    assert "almost an order of magnitude fewer" in text
    (section,) = sections(study(seeds=3))
    for sentence in verdicts(compare_methods(section)):
        assert f"- {sentence}" in text
    assert "./run.sh sweep --cfg results/fig3/sweep.yaml && ./run.sh tables runs/fig3 --out results/fig3" in text
    assert "[single](single)" in text
    assert str(tmp_path) not in text
    assert write_report(Path("results")).read_text() == text


def test_a_study_of_tucker_alone_is_reported_by_its_options(tmp_path, no_figures, monkeypatch):
    """After the comparisons of methods, whatever its name."""
    monkeypatch.chdir(tmp_path)
    write_study([write_runs(Path("runs/a"), study(seeds=3, methods=("tucker",)))], Path("results/a"))
    write_study([write_runs(Path("runs/b"), study(seeds=3))], Path("results/b"))
    text = write_report(Path("results")).read_text()
    assert (
        text.index("## b\n") < text.index("## a\n") < text.index("#### Accuracy by query/output rank, key/value rank")
    )
    assert "| Tucker ranks=8,_,_, HOSVD " in text
    assert "![Accuracy by query/output rank, key/value rank](a/by_ranks_1_and_ranks_2.png)" in text
    assert Path("results/a/by_ranks_1_and_ranks_2.png").is_file()
    assert "a/accuracy_params.png" not in text


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tables", ["nowhere", "--out", "out"], "nowhere: no such file or folder"),
        ("tables", ["a.json", "nowhere"], "nowhere: no such file or folder"),
        ("tables", ["a.json", "a.json"], "--out: name a folder for the tables of several runs"),
        ("tables", ["runs", "--out", "a.json"], "a.json is a file; name another folder"),
        ("report", ["runs"], "runs: no folder in it has a results.jsonl"),
        ("report", [], "experiments/results: no folder in it has a results.jsonl"),
    ],
)
def test_scripts_say_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys, script, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("a.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    assert runpy.run_path(str(ROOT / "experiments" / f"{script}.py"))[f"{script}_main"]() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


def test_a_sweep_s_folder_gets_its_tables_inside(tmp_path, monkeypatch, capsys, no_figures):
    write_runs(tmp_path, study(seeds=1))
    monkeypatch.setattr(sys, "argv", ["tables.py", str(tmp_path)])
    assert runpy.run_path(str(ROOT / "experiments" / "tables.py"))["tables_main"]() == 0
    assert (tmp_path / "tables.md").is_file()
    assert "13 runs of 13 settings" in capsys.readouterr().out
