"""The report over studies of any kind: settings, figure and numbers of each, verdicts only where Tucker meets other methods."""

from pathlib import Path

import pytest

from tests.report.synthetic import run_results, study, write_runs
from vit_tucker.report import ablation_figures
from vit_tucker.report import study as study_module
from vit_tucker.report.report import write_report
from vit_tucker.report.sections import sections
from vit_tucker.report.study import write_study
from vit_tucker.report.tables import settings_table

VERDICTS = ("## The claim", "## In short", "order of magnitude", "Pareto front, where")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Empty files under the figures' names: drawing is tested elsewhere, and takes seconds."""

    def empty(section, cost, folder):
        (folder / f"accuracy_{cost}.png").touch()
        return f"accuracy_{cost}.png", []

    monkeypatch.setattr(study_module, "draw_accuracy", empty)
    monkeypatch.setattr(study_module, "draw_curves", lambda *_: None)
    monkeypatch.setattr(ablation_figures, "draw_ablation", lambda *_: None)
    monkeypatch.setattr("vit_tucker.report.stats.RESAMPLES", 100)


def own_study(starts=("pretrained",), methods=("mine", "其他")):
    """Runs of methods that the package does not have, without a dense reference."""
    return [
        run_results(
            f"{method}-{rank}-{start}",
            {"method": method, "rank": rank, "init": start},
            1000 * rank,
            80.0 + rank + i + 3 * (start != "random"),
            seed,
        )
        for i, method in enumerate(methods)
        for rank in (2, 5)
        for start in starts
        for seed in (0, 1)
    ]


def report_of(tmp_path, **studies):
    for name, runs in studies.items():
        write_study([write_runs(tmp_path / "runs" / name, runs)], tmp_path / "results" / name)
    return write_report(tmp_path / "results").read_text()


def test_a_study_of_ones_own_methods_has_its_settings_figure_and_numbers(tmp_path):
    text = report_of(tmp_path, mine=own_study())
    (section,) = sections(own_study())
    assert "![vit_tiny_patch16_224 on digits](mine/accuracy_params.png)" in text
    assert settings_table(section).markdown() in text
    for row in ("| mine-2-pretrained | mine   |", "| 其他-5-pretrained   | 其他     |"):
        assert row in text
    assert "no dense run" in text
    assert not any(part in text for part in VERDICTS)
    assert "How the attention starts" not in text  # one start only
    assert (
        '<img alt="Top-1 accuracy over attention parameters, a panel for each study" src="accuracy_params_light.svg"'
        in text
    )
    assert (tmp_path / "results" / "accuracy_params_dark.svg").is_file()


def test_starts_of_ones_own_methods_are_compared(tmp_path):
    text = report_of(tmp_path, mine=own_study(("pretrained", "random")))
    assert "## How the attention starts" in text
    assert (
        "- **mine, random against converted: behind** after fine-tuning: ahead in 0, behind in 2, equal in 0 of 2"
        in text
    )
    assert "#### Accuracy by start" in text
    assert not any(part in text for part in VERDICTS)


def test_verdicts_stand_with_the_study_that_they_are_of(tmp_path):
    text = report_of(tmp_path, a=own_study(), b=study(seeds=2))
    assert all(part in text for part in VERDICTS)
    first, _, second = text.partition("## a\n")
    assert "Pareto front, where" in first.partition("## b\n")[2]
    assert not any(part in second for part in VERDICTS)
    assert "| mine-2-pretrained |" in second


def test_dense_runs_and_a_single_run_are_studies_too(tmp_path):
    text = report_of(tmp_path, dense=[run for run in study(seeds=2) if run["config"]["attention"] is None])
    assert "| mha " in text
    assert "<picture>" not in text
    assert not list((tmp_path / "results").glob("*.svg"))
    single = report_of(tmp_path / "single", one=own_study()[:1])
    assert "| mine-2-pretrained |" in single
    assert Path(tmp_path / "single" / "results" / "one" / "settings.csv").is_file()
