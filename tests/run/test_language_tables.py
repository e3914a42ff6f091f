"""Tables, figures and sweeps of language models: perplexity in the place of accuracy, and the lowest is the best."""

import csv
import json
from pathlib import Path

import pytest
import yaml

pytest.importorskip("transformers")

from tests.run.text import TINY, config, write_text
from tests.run.tiny import config as image_config
from tests.run.tiny import run, trained
from vit_tucker.cli.main import main
from vit_tucker.errors import ConfigError
from vit_tucker.report.collect import collect
from vit_tucker.report.compare import comparison
from vit_tucker.report.figures import pareto_front
from vit_tucker.report.sections import sections
from vit_tucker.report.study import write_study

RANKS = {"tucker_2": [2, 4, 4], "tucker_4": [4, 8, 4]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of dense and of two Tucker settings."""
    folder = tmp_path_factory.mktemp("runs")
    write_text(folder / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed in (0, 1):
            given = [f"seed={seed}", "train.eval_interval=1"]
            run(config(f"output_dir=runs/dense-{seed}", "name=dense", *given))
            for name, ranks in RANKS.items():
                attention = {"method": "tucker", "ranks": ranks, "init": "random"}
                run(config(f"output_dir=runs/{name}-{seed}", f"name={name}", *given, attention=attention))
    return folder / "runs"


def test_runs_side_by_side(runs):
    last = json.loads((runs / "dense-0" / "results.json").read_text())["last"]
    table = comparison([runs / "dense-0", runs / "tucker_2-0"])
    header, _, dense, tucker = table.splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")][5:8] == ["perplexity", "best epoch", "bits per byte"]
    cells = [cell.strip() for cell in dense.strip("|").split("|")]
    assert (cells[5], cells[7]) == (f"{last['eval_perplexity']:.2f}", f"{last['eval_bits_per_byte']:.2f}")
    assert "tucker ranks=2,4,4" in tucker


def test_images_and_text_have_no_table_in_common(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained(image_config("output_dir=images"))
    with pytest.raises(ConfigError, match=r"images: one is of images, one of text"):
        comparison([runs / "dense-0", Path("images")])
    assert len(sections(collect([runs, Path("images")]).results)) == 2


def test_a_study_has_perplexities(runs, tmp_path):
    write_study([runs], tmp_path, quiet=True)
    page = (tmp_path / "tables.md").read_text()
    assert "hf:llama on tokens" in page
    assert "perplexity and bits per byte: after the last epoch" in page
    assert "top-1" not in page
    assert "![Perplexity over attention parameters](perplexity_params.png)" in page
    assert (tmp_path / "perplexity_params.pdf").is_file()
    with (tmp_path / "settings.csv").open() as opened:
        rows = {row["config"]: row for row in csv.DictReader(opened)}
    values = [
        json.loads((runs / f"dense-{seed}" / "results.json").read_text())["last"]["eval_perplexity"] for seed in (0, 1)
    ]
    assert float(rows["dense"]["perplexity_mean"]) == pytest.approx(sum(values) / 2)
    assert rows.keys() == {"dense", *RANKS}


def test_the_front_is_of_the_lowest(runs):
    (section,) = sections(collect([runs]).results)
    costs, scores = [10, 20, 30], [30.0, 25.0, 40.0]
    settings = section.comparable
    assert [s.merit for s in settings] == [-s.score for s in settings]
    assert pareto_front(costs, [-score for score in scores]) == [0, 1]
    assert pareto_front(costs, scores) == [0, 2]  # what the signs would hide


@pytest.mark.slow
def test_a_sweep_shows_perplexities(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_text(Path("text"))
    recipe = {**TINY, "train": {**TINY["train"], "epochs": 1}}
    Path("base.yaml").write_text(yaml.safe_dump(recipe))
    cells = [{"name": "dense", "attention": None}, {"name": "gqa", "attention": {"method": "gqa", "num_kv_heads": 1}}]
    Path("sweep.yaml").write_text(
        yaml.safe_dump({"base": "base.yaml", "output_dir": "out", "seeds": [0], "cells": cells})
    )
    assert main(["sweep", "--cfg", "sweep.yaml"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["sweep", "--cfg", "sweep.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    values = [json.loads(Path("out", name, "seed0", "results.json").read_text()) for name in ("dense", "gqa")]
    assert "mean perplexity" in shown
    assert all(f"{value['last']['eval_perplexity']:.2f}" in shown for value in values)
