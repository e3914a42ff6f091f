"""Names and paths that a config or a folder from elsewhere gives stay where they belong, and are names; one line each."""

import json
from pathlib import Path

import pytest

import vit_tucker as vt
from vit_tucker.cli import main
from vit_tucker.config.load import load_config
from vit_tucker.report.ablations import stem_of
from vit_tucker.sweep.plan import load_sweep

MODEL = "model: {name: vit_tiny_patch16_224}\n"
CELLS = "base: x.yaml\nstart: null\ncells: [{name: dense, attention: null}]\n"
RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "digits" / "digits-dense-0"
CONTROL = r"the character ('\\|U\+00)"
ELSEWHERE = "names no folder inside another"
LONG = "file systems allow"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("name: a/../../x", f"x.yaml:2: name: 'a/../../x' {ELSEWHERE}"),
        ("name: ..", ELSEWHERE),
        ("name: /etc/x", ELSEWHERE),
        ("name: ''", ELSEWHERE),
        ('name: "a\\nb"', CONTROL),
        ('name: "a\\0b"', CONTROL),
        (f"name: {'x' * 256}", LONG),
        (f"name: {'x' * 254}", f"name: .*{LONG}"),  # and the seed after it
        (f"name: {'ü' * 128}", LONG),
        ('output_dir: "a\\0b"', f"output_dir: .*{CONTROL}"),
        ('output_dir: "a\\nb"', f"output_dir: .*{CONTROL}"),
        (f"output_dir: runs/{'x' * 300}/a", f"output_dir: .*{LONG}"),
        ('data: {root: "a\\0b"}', f"data.root: .*{CONTROL}"),
        ('data: {labels: "a\\nb"}', "data.labels: "),
        ('train: {distill: {teacher: "a\\0b"}}', f"teacher: .*{CONTROL}"),
    ],
)
def test_of_configs(keys, message):
    Path("x.yaml").write_text(f"{MODEL}{keys}\n")
    with pytest.raises(vt.ConfigError, match=message) as caught:
        load_config("x.yaml")
    assert "\n" not in str(caught.value)
    assert main(["train", "--cfg", "x.yaml", "--dry-run"]) == 2
    assert sorted(Path().iterdir()) == [Path("x.yaml")]


@pytest.mark.parametrize(
    ("name", "folder"),
    [("a", "runs/a-0"), ("a/b", "runs/a/b-0"), ("a..b", "runs/a..b-0"), ("日本 語", "runs/日本 語-0")],
)
def test_names_that_are_names(name, folder):
    Path("x.yaml").write_text(f"{MODEL}name: {name}\n")
    assert load_config("x.yaml").output_dir == folder


def test_the_name_of_a_file_is_one_too():
    Path("a\nb.yaml").write_text(MODEL)
    with pytest.raises(vt.ConfigError, match=f"name: .*{CONTROL}"):
        load_config("a\nb.yaml")
    assert load_config("a\nb.yaml", ["name=ab"]).output_dir == "runs/ab-0"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: dense", "name: ../dense", "can't be a folder's name here"),
        ("name: dense", "name: a/b", "can't be a folder's name here"),
        ("name: dense", f"name: {'x' * 256}", "can't be a folder's name here"),
        ("name: dense", 'name: "a\\nb"', "can't be a folder's name here"),
        ("start: null", 'output_dir: "a\\0b"', f"output_dir: .*{CONTROL}"),
    ],
)
def test_of_sweeps(old, new, message):
    Path("x.yaml").write_text(MODEL)
    Path("s.yaml").write_text(CELLS)
    assert [str(job.folder) for job in load_sweep("s.yaml").jobs] == ["runs/s/dense/seed0"]
    Path("s.yaml").write_text(CELLS.replace(old, new))
    with pytest.raises(vt.ConfigError, match=message) as caught:
        load_sweep("s.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a/../../x", "/tmp/x", "a\nb", "x" * 300])
def test_of_results(name, capfd):
    """compare --save and tables make files by the names in a folder from elsewhere."""
    run = Path("in/run")
    run.mkdir(parents=True)
    for file in RESULTS.iterdir():
        (run / file.name).write_bytes(file.read_bytes())
    assert main(["compare", "in/run", "--save", "kept"]) == 0
    assert Path("kept/digits-dense-0/results.json").is_file()
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**results, "name": name}))
    before = sorted(Path().rglob("*"))
    capfd.readouterr()
    assert main(["compare", "in/run", "--save", "kept"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: in/run: results.json: name: ")
    assert error.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


def test_of_tables():
    assert stem_of("attention.ranks.1,attention.ranks.2") == "by_ranks_1_and_ranks_2"
    for option in ("attention.a/../../x", "a\nb", "a\0b", "x" * 999):
        assert Path(stem_of(option)).name == stem_of(option)
        assert stem_of(option).isprintable()
        assert len(stem_of(option)) <= 200


@pytest.mark.parametrize(
    "command",
    [
        "evaluate {0}",
        "predict {0} x.png",
        "explain {0} x.png",
        "export {0}",
        "compare {0}",
        "tables {0}",
        "train --cfg {0}",
    ],
)
def test_arguments_longer_than_names_are_a_line_too(command, capfd):
    Path("x.png").touch()
    assert main(command.format("x" * 300).split()) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
