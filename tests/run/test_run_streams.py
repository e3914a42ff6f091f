"""Whole tiny runs on `datasets` and webdataset, in this process: by name from training to prediction, or one line."""

import io
import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

import vit_tucker as vt
from tests.data.test_shards import write as write_shard
from tests.data.trees import COLOURS
from tests.run.test_run_folders import command, config  # noqa: F401
from tests.run.tiny import run

pytestmark = pytest.mark.usefixtures("in_tmp")
ORDERS = {"train": ["red", "blue", "green"], "validation": ["green", "red", "blue"]}


def png(name):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), COLOURS[name]).save(file, "PNG")
    return file.getvalue()


def write_parquet():
    """CIFAR-100's columns; each split numbers its classes in another order, and the images are sorted otherwise."""
    datasets.disable_progress_bars()
    Path("set").mkdir()
    for split, order in ORDERS.items():
        names = sorted(order) * 4
        features = datasets.Features(img=datasets.Image(), fine_label=datasets.ClassLabel(names=order))
        columns = {"img": [{"bytes": png(name), "path": None} for name in names]}
        columns["fine_label"] = [order.index(name) for name in names]
        datasets.Dataset.from_dict(columns, features=features).to_parquet(f"set/{split}.parquet")


def write_tars():
    for split, order in ORDERS.items():
        write_shard(
            Path("set"), [{"JPEG": png(name), "json": json.dumps({"class": name})} for name in order * 4], split
        )


FORMATS = {
    "hfds": (write_parquet, "{input_key: img, target_key: fine_label}", []),
    "hfids": (write_parquet, "{input_key: img, target_key: fine_label}", ["data.num_samples=12"]),
    "wds": (write_tars, "{target_key: class}", ["data.class_map={red: 0, blue: 1, green: 2}"]),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_run_goes_by_the_names_of_the_training_split(kind, command):  # noqa: F811
    write, keys, more = FORMATS[kind]
    write()
    dataset = "wds/" if kind == "wds" else f"{kind}/set"
    own = [f"data.dataset={dataset}", f"data.root={'set' if kind == 'wds' else 'cache'}", *more]
    for dry_run in (True, False):
        with pytest.raises(
            vt.VitTuckerError, match=rf"split 'train'.*set data.dataset_kwargs=\{keys[:-1]}\}}$"
        ) as caught:
            run(config(*own, "model.num_classes=3"), dry_run=dry_run)
        assert "\n" not in str(caught.value)
    assert not Path("a").exists()
    own.append(f"data.dataset_kwargs={keys}")
    with pytest.raises(vt.DataError, match="model.num_classes=2: the class map has 3 classes|label 2"):
        run(config(*own, "model.num_classes=2"), dry_run=True)
    number = ["model.num_classes=3"] if kind == "wds" else []  # else the files tell
    assert run(config(*own, *number))["best"]["top1"] == 100.0
    assert json.loads(Path("a/classes.json").read_text()) == {"red": 0, "blue": 1, "green": 2}
    assert "classes: 3 (red, blue, green)" in Path("a/train.log").read_text()
    out, _ = command("evaluate", "a", "--json")
    assert (json.loads(out)["top1"], json.loads(out)["count"]) == (100.0, 12)
    Path("green.png").write_bytes(png("green"))
    out, _ = command("predict", "a", "green.png", "--json")
    assert json.loads(out)[0]["top"][0]["label"] == "green"
    out, _ = command("export", "a", "--format", "dense", "--out", "dense", "--json")
    (stage,) = json.loads(out)["stages"]
    assert stage["real"]["accuracy_file"] == 1.0
