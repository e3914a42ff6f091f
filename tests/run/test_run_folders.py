"""Whole tiny runs on image folders, in this process: one class map from training to prediction."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vit_tucker as vt
from tests.data.trees import COLOURS, image
from tests.run.tiny import run
from vit_tucker.cli import main
from vit_tucker.config.load import load_config
from vit_tucker.data.image_files import ImageOptions
from vit_tucker.explain.images import data_images
from vit_tucker.inference.predict import classes_for, image_options, open_model

pytestmark = pytest.mark.usefixtures("in_tmp")
SMALL = [
    "model.depth=1",
    "model.img_size=8",
    "model.patch_size=4",
    "model.embed_dim=32",
    "model.num_heads=2",
    "attention=null",
]
SMALL += ["model.num_classes=null", "model.in_chans=3", "data.dataset=folder", "data.root=set", "data.num_workers=0"]
SMALL += ["data.no_aug=true", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]", "data.crop_pct=1", "train.epochs=6"]
SMALL += [
    "train.global_batch_size=6",
    "train.lr=5e-3",
    "train.warmup_epochs=0",
    "train.log_ranks=false",
    "output_dir=a",
]


def config(*overrides):
    return load_config("digits/dense", [*SMALL, *overrides])


@pytest.fixture
def colours():
    """A training split of three colours, and a validation split without the first of them by name."""
    for name, colour in COLOURS.items():
        for i in range(4):
            image(Path(f"set/train/{name}/{i}.png"), colour)
            if name != "blue":
                image(Path(f"set/val/{name}/{i}.png"), colour)


@pytest.fixture
def command(capfd):
    """Run a command; returns what it printed on standard output and standard error."""

    def run_command(*arguments, status=0):
        capfd.readouterr()
        assert main([str(text) for text in arguments]) == status
        return capfd.readouterr()

    return run_command


def test_one_class_map_from_training_to_prediction(colours, command):
    results = run(config())
    assert results["best"]["top1"] == 100.0  # scored by its own numbers, a split without 'blue' had 0
    assert json.loads(Path("a/classes.json").read_text()) == {"blue": 0, "green": 1, "red": 2}
    assert list(vt.load("a").pretrained_cfg["label_names"]) == ["blue", "green", "red"]
    log = Path("a/train.log").read_text()
    assert "split 'validation': no images of 1 of 3 classes: blue" in log
    assert "classes: 3 (blue, green, red); with images: 3 in split 'train', 2 in split 'validation'" in log
    out, err = command("evaluate", "a", "--json")
    assert json.loads(out)["top1"] == 100.0
    assert "note: split 'validation': no images of 1 of 3 classes: blue" in err
    out, _ = command("predict", "a", "set/val/red/0.png", "set/train/blue", "--json")
    assert [found["top"][0]["label"] for found in json.loads(out)] == ["red", *["blue"] * 4]
    shutil.copytree("a/checkpoints/best", "alone")  # the map is in the checkpoint too
    shutil.rmtree("set/train")
    for model in ("a", "alone"):
        out, _ = command("evaluate", model, "--data", "folder", "--json", "data.root=set")
        assert json.loads(out)["top1"] == 100.0
    out, _ = command("export", "a", "--format", "dense", "--out", "dense", "--json")
    (stage,) = json.loads(out)["stages"]
    assert (stage["real"]["accuracy_model"], stage["real"]["accuracy_file"]) == (1.0, 1.0)
    model, data = open_model("a"), load_config("a").data
    assert {one.label for one in data_images(data, 8, "RGB", classes_for(model, "a", data)[0])} == {1, 2}
    image(Path("set/val/blu/0.png"), COLOURS["blue"])
    for model in ("a", "alone"):
        _, err = command("evaluate", model, "--data", "folder", "data.root=set", status=2)
        assert "split 'validation' has a class that the class map lacks: blu; " in err
        assert err.strip().endswith("did you mean 'blue'?")
        assert len(err.strip().splitlines()) == 1


def test_unknown_classes_are_refused_before_the_first_step(colours):
    image(Path("set/val/pink/0.png"))
    for dry_run in (True, False):
        with pytest.raises(vt.DataError, match=r"has a class that the class map lacks: pink; it has 3"):
            run(config(), dry_run=dry_run)
    shutil.rmtree("set/val/pink")
    with pytest.raises(vt.DataError, match=r"split 'train': label 2 of .*, but there are 2 classes"):
        run(config("model.num_classes=2"), dry_run=True)
    with pytest.raises(vt.ConfigError, match=r"data.value_range: must be \[low, high\] with low below high"):
        config("data.value_range=[5, 5]")
    assert not Path("a").exists()


def test_a_run_goes_on_with_its_own_map_or_not_at_all(colours):
    run(config("train.epochs=1"))
    before = Path("a/classes.json").read_text()
    more = "train.epochs=2"
    image(Path("set/train/black/0.png"), (0, 0, 0))  # would move all numbers up
    with pytest.raises(
        vt.DataError, match=r"other classes than the classes.json that the run began with \(3\): new: black;"
    ):
        run(config(more), allow_changes=True)
    shutil.rmtree("set/train/black")
    shutil.move("set/train/blue", "set/blue")
    with pytest.raises(vt.DataError, match=r"\(3\): missing: blue; put the folders back"):
        run(config(more), allow_changes=True)
    shutil.move("set/blue", "set/train/blue")
    assert run(config(more), allow_changes=True)["epochs"] == 2
    assert Path("a/classes.json").read_text() == before
    shutil.rmtree("set/train")  # an evaluation needs no training split
    assert run(config(more), evaluate_only=True)["evaluation"]["count"] == 8


def test_more_classes_than_the_data_have_get_numbers(colours):
    run(config("train.epochs=1", "model.num_classes=5"))
    assert list(vt.load("a").pretrained_cfg["label_names"]) == ["blue", "green", "red", "3", "4"]
    assert list(json.loads(Path("a/classes.json").read_text())) == ["blue", "green", "red"]
    assert "the model has 5, 2 of them never seen" in Path("a/train.log").read_text()


def test_how_images_are_read_goes_with_the_checkpoint(colours, command):
    """Images of 12 bits, some to be turned: training, evaluation and prediction see the same."""
    for split in ("train", "val"):
        for number, name in enumerate(COLOURS):
            shutil.rmtree(f"set/{split}/{name}", ignore_errors=True)
            Path(f"set/{split}/{name}").mkdir()
            for i in range(4):
                values = np.full((8, 8), 400 + 1600 * number, dtype=np.uint16)
                exif = Image.Exif()
                exif[0x0112] = 6
                Image.fromarray(values).save(f"set/{split}/{name}/{i}.png", exif=exif)
    results = run(config("data.value_range=[0, 4095]", "data.exif_orientation=true"))
    assert results["best"]["top1"] == 100.0
    stored = json.loads(Path("a/checkpoints/best/config.json").read_text())
    assert stored["vit_tucker"]["images"] == {"exif_orientation": True, "value_range": [0.0, 4095.0]}
    assert "exif_orientation" not in stored["pretrained_cfg"]
    model = open_model("a/checkpoints/best")
    assert image_options(model) == ImageOptions(True, (0.0, 4095.0))
    vt.save(model, "saved")  # and on from there
    shutil.move("a", "elsewhere")
    for name in ("elsewhere", "saved"):
        out, _ = command("predict", name, "set/val", "--json")
        assert all(found["top"][0]["label"] in found["file"] for found in json.loads(out))
    out, _ = command("evaluate", "saved", "--data", "folder", "data.root=set", "--json")
    assert json.loads(out)["top1"] == 100.0
    assert vt.load("saved") is not None
    del stored["vit_tucker"]["stored"]
    for nonsense in ({"value_range": "x"}, ["x"]):
        stored["vit_tucker"]["images"] = nonsense
        Path("saved/config.json").write_text(json.dumps(stored))
        _, err = command("predict", "saved", "set/val", status=2)
        assert f"config.json: vit_tucker.images: {nonsense!r} is no way to read images" in err


def test_all_images_are_checked_at_the_start(colours, capfd):
    for name in ("train/red/1.png", "train/blue/2.png", "val/red/0.png"):
        Path("set", name).write_bytes(b"no image")
    with pytest.raises(vt.DataError, match=r"^3 images could not be read, data.max_bad_images allows 2: .*blue/2.png"):
        run(config("data.check=true", "data.max_bad_images=2"), dry_run=True)
    listed = [line for line in capfd.readouterr().out.splitlines() if line.startswith("bad image: ")]
    assert [line.partition(" of split")[0].removeprefix("bad image: ") for line in listed] == [
        "set/train/blue/2.png", "set/train/red/1.png", "set/val/red/0.png"
    ]  # fmt: skip
    assert not Path("a").exists()
    results = run(config("data.check=true", "data.max_bad_images=3", "train.epochs=1"))
    assert len(results["bad_images"]) == 3
    assert Path("a/train.log").read_text().count("bad image: ") == 3
