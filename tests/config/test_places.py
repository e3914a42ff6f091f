"""Paths of a config: which keys hold some, and what they mean in another folder."""

import json
from pathlib import Path

import pytest

from vit_tucker.config.load import everywhere, load_config
from vit_tucker.config.places import PATHS, as_stored, bases_of, map_paths, paths_of, seen_from_here, started_text
from vit_tucker.config.schema import RunConfig

VALUES = {
    "name": "a/b",
    "plugins": ["mine.py", "package.module"],
    "model": {"name": "local-dir:saved", "checkpoint": "runs/dense"},
    "data": {
        "root": "sets",
        "class_map": "classes.txt",
        "labels": {"train": "train.csv", "validation": "val.csv"},
        "dataset_kwargs": {"class_map": "other.json", "input_key": "jpg"},
    },
    "train": {"lr": 0.1, "distill": {"teacher": "runs/teacher"}},
}
FILES = ["mine.py", "saved", "runs/dense", "sets", "classes.txt", "train.csv", "val.csv", "other.json", "runs/teacher"]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A project with a run that was started in it, and another folder, which is the current one."""
    project, other = tmp_path / "project", tmp_path / "other"
    for file in FILES:
        (project / file).mkdir(parents=True)
    other.mkdir()
    run = project / "runs" / "a"
    run.mkdir()
    monkeypatch.chdir(project)
    (run / "started.json").write_text(started_text(Path("runs/a")))
    assert seen_from_here(VALUES, run) == VALUES
    monkeypatch.chdir(other)
    return project, run


def test_all_keys_with_paths_and_no_others():
    assert paths_of(VALUES) == FILES
    changed = map_paths(VALUES, str.upper)
    assert changed["plugins"] == ["MINE.PY", "package.module"]
    assert changed["model"] == {"name": "local-dir:SAVED", "checkpoint": "RUNS/DENSE"}
    assert changed["data"]["dataset_kwargs"] == {"class_map": "OTHER.JSON", "input_key": "jpg"}
    assert changed["name"] == "a/b"
    given = {"model": {"name": "vit_tiny"}, "train": {"distill": {"teacher": "host"}}, "data": {"class_map": {"a": 0}}}
    assert paths_of(given) == []
    for junk in ({}, {"model": 3, "data": ["root"], "plugins": 7}, {"data": {"labels": [1], "root": None}}):
        assert map_paths(junk, str.upper) == junk
    fields = {name for part in (RunConfig.model_fields, *(RunConfig.model_fields[s].annotation.model_fields
              for s in ("model", "data", "train"))) for name in part}  # fmt: skip
    assert {key.split(".")[min(1, key.count("."))] for key in PATHS} <= fields


def test_a_run_elsewhere_and_moved_means_the_same_files(places):
    project, run = places
    assert paths_of(seen_from_here(VALUES, run)) == [str(project / file) for file in FILES]
    moved = project.with_name("moved")
    project.rename(moved)
    seen = seen_from_here(VALUES, moved / "runs" / "a")
    assert paths_of(seen) == [str(moved / file) for file in FILES]
    kept, started = as_stored(seen, VALUES, moved / "runs" / "a")
    assert kept == VALUES
    assert json.loads(started) == {"in": str(moved), "run": str(moved / "runs" / "a")}
    in_full = map_paths(VALUES, lambda path: str(project / path))  # as an author wrote them before the move
    assert paths_of(seen_from_here(in_full, moved / "runs" / "a")) == [str(moved / file) for file in FILES]
    (moved / "runs" / "a").rename(moved.with_name("alone"))
    assert (
        seen_from_here(VALUES, moved.with_name("alone")) == VALUES
    )  # which leads nowhere, and is said by who needs it


def test_what_is_changed_elsewhere_is_kept_in_full(places):
    _, run = places
    Path("mine").mkdir()
    seen = seen_from_here(VALUES, run)
    seen["data"] = {**seen["data"], "root": "mine"}
    kept, _ = as_stored(seen, VALUES, run)
    assert kept["data"]["root"] == str(Path("mine").absolute())
    assert kept["model"] == VALUES["model"]
    assert as_stored(VALUES, {}, run)[0] == VALUES  # a run that begins anew


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"in": 1, "run": 2}', '{"in": "x"}', '{"in": "\\u0000", "run": "\\u0000"}']
)
def test_a_foreign_started_file_changes_nothing(places, text):
    _, run = places
    (run / "started.json").write_text(text)
    assert seen_from_here(VALUES, run) == VALUES
    assert bases_of(run) == ([], None)


def test_a_config_means_the_same_everywhere(monkeypatch, tmp_path):
    config = load_config("digits/dense", ["model.checkpoint=runs/dense", "train.distill={}"])
    full = everywhere(config)
    assert full.model.checkpoint == str(Path("runs/dense").absolute())
    assert full.train == config.train
    monkeypatch.chdir(tmp_path)
    assert everywhere(full) == full != everywhere(config)
