"""The explain command as users type it."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.explain.runs import make_pair
from vit_tucker.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def photo(tmp_path):
    file = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(file)
    return file


def size_of(file):
    with Image.open(file) as picture:
        return picture.size


def test_pictures_table_and_tensorboard(runs, photo, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main(
            ["explain", str(runs[1]), str(photo), "--data", "1", "--device", "cpu", "--out", str(out), "--tensorboard"]
        )
        == 0
    )
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("photo: dense ")
    assert "; tucker " in printed[0]
    assert "maps differ by 0." in printed[0]
    assert printed[-1] == f"{out}: 4 pictures, agreement.csv"
    names = [f"{name}_{kind}.png" for name in ("photo", "validation-0000") for kind in ("heads", "rollout")]
    assert sorted(file.name for file in out.glob("*.png")) == names
    rows = list(csv.DictReader((out / "agreement.csv").open()))
    assert len(rows) == 2 * (2 * 4 + 1)
    assert {row["layer"] for row in rows} == {"blocks.0.attn", "blocks.1.attn", "rollout"}
    assert all(0 < float(row["total_variation"]) < 1 for row in rows)
    events = EventAccumulator(str(out), size_guidance={"images": 0})
    events.Reload()
    assert sorted(events.Tags()["images"]) == sorted(f"attention/{name[:-4].replace('_', '/')}" for name in names)
    shown = events.Images("attention/photo/heads")[0]
    assert (shown.width, shown.height) == size_of(out / "photo_heads.png")


def test_json_and_a_dense_run_alone(runs, photo, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["explain", str(runs[0]), str(photo), "--json", "--out", str(out), "--layers", "-1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["folder"] == str(out)
    (image,) = found["images"]
    assert image["files"] == ["photo_rollout.png", "photo_heads.png"]
    assert list(image["predictions"]) == ["dense"]
    assert image["agreement"] == {}
    assert not (out / "agreement.csv").exists()
    assert size_of(out / "photo_heads.png")[1] < size_of(out / "photo_rollout.png")[1]  # one layer


def test_the_same_command_writes_the_same_bytes(runs, photo, tmp_path):
    for name in ("a", "b"):
        assert (
            main(["explain", str(runs[1]), str(photo), "--out", str(tmp_path / name), "--relevance", "--target", "3"])
            == 0
        )
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == ["agreement.csv", "photo_heads.png", "photo_relevance.png"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "explain needs images: files, folders, or --data N"),
        (["gone.png"], "gone.png: no such file or folder"),
        (["{photo}", "{text}"], "text.png: can't be read as an image"),
        (["--data", "361"], "--data 361: the evaluation split of digits has 360 images"),
        (["{photo}", "--layers", "0,5"], "layer index 5 is outside 0..1"),
        (["{photo}", "--dense", "nowhere"], "--dense nowhere: no such folder"),
        (["{photo}", "--discard-ratio", "1"], "--discard-ratio 1: must be at least 0 and below 1"),
        (["{photo}", "--target", "3"], "--target: is the class of --relevance"),
        (["{photo}", "--relevance", "--target", "10"], "--target 10: the dense model has the classes 0 to 9"),
        (["{photo}", "--relevance", "--head-fusion", "max"], "it takes no --head-fusion"),
        (["{photo}", "--device", "cpy"], "--device cpy: one of cpu, cuda"),
        (["{photo}", "--head-fusion", "maxx"], "did you mean 'max'"),
        (["{photo}", "--out", "{photo}"], "photo.png is a file; name another folder"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(runs, photo, tmp_path, capsys, arguments, message):
    text = tmp_path / "text.png"
    text.write_text("no image")
    given = [argument.format(photo=photo, text=text) for argument in arguments]
    out = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    assert main(["explain", str(runs[1]), *given, *out]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["photo.png", "text.png"]


def test_a_model_elsewhere_needs_a_place_for_its_pictures(photo, capsys):
    assert main(["explain", "owner/name", str(photo)]) == 2
    assert "owner/name: no folder here; name one for the pictures with --out" in capsys.readouterr().err
