"""The small files of a run folder, damaged: one line, or what they said before."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint.mutations import rewrite_json, rewrite_text
from tests.checkpoint.test_mutations import EXAMPLES
from tests.report.synthetic import run_results
from vit_tucker.data.classes import stored_classes
from vit_tucker.errors import VitTuckerError
from vit_tucker.report.collect import collect
from vit_tucker.report.compare import comparison
from vit_tucker.storage.run_dir import RunDir

DATA = {
    "input_size": [1, 16, 16],
    "interpolation": "bilinear",
    "mean": [0.3],
    "std": [0.4],
    "crop_pct": 1.0,
    "crop_mode": "center",
}
PATCH = {"applied": True, "layers": [{"name": "blocks.0.attn", "method": "tucker", "options": "ranks=2,8,8"}]}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    attention = {"method": "tucker", "ranks": [2, 8, 8]}
    texts = {
        "data_config.json": DATA,
        "patch.json": PATCH,
        "classes.json": {"ant": 0, "bee": 1},
        "results.json": run_results("a", attention, 1000, 90.0, 1),
    }
    for name, values in texts.items():
        (folder / name).write_text(json.dumps(values))
    return folder


@settings(
    max_examples=EXAMPLES or 80,
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_a_damaged_file_is_one_line(run_folder, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run_folder, folder)

    def pick(options):
        return data.draw(st.sampled_from(list(options)))

    file = folder / pick(sorted(f.name for f in folder.iterdir()))
    (rewrite_text if pick(["json", "json", "text"]) == "text" else rewrite_json)(file, pick)
    run_dir, refused = RunDir(folder), []
    readers = {
        "data_config.json": lambda: run_dir.read_data_config().keys() >= DATA.keys(),
        "patch.json": lambda: run_dir.read_patch()["layers"][0]["method"],
        "classes.json": lambda: stored_classes(folder),
        "results.json": lambda: (comparison([folder]), collect([folder]).results),
    }
    for name, read in readers.items():
        try:
            assert read()
        except VitTuckerError as error:
            refused.append((name, str(error)))
    assert [name for name, _ in refused] in ([], [file.name])
    assert all(text.isprintable() for _, text in refused)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("data_config.json", "mean", [float("nan")], "NaN is no finite number"),
        ("data_config.json", "mean", [True], "mean.0: Input should be a valid number, not True"),
        ("data_config.json", "std", [0.0], "std.0: Input should be greater than 0, not 0.0"),
        ("data_config.json", "crop_mode", "centre", "crop_mode: must be one of center, squash, border, not 'centre'"),
        ("data_config.json", "mean", None, "mean: missing"),
        ("patch.json", "layers", [], "layers: List should have at least 1 item after validation, not 0"),
    ],
)
def test_what_is_wrong_is_named(run_folder, tmp_path, name, key, value, message):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    values = json.loads((folder / name).read_text())
    values = {k: v for k, v in values.items() if k != key} if value is None else {**values, key: value}
    (folder / name).write_text(json.dumps(values))
    read = RunDir(folder).read_data_config if name == "data_config.json" else RunDir(folder).read_patch
    with pytest.raises(VitTuckerError, match=message):
        read()
