"""One class map: by name in a total order, from files, for every split."""

import itertools
import json
import random

import pytest
from timm.utils.misc import natural_key as timms_key

from tests.data.trees import classes_of, folder_config, opened, tree
from vit_tucker.data.classes import padded, read_class_map, refuse_changed, stored_classes, unpadded
from vit_tucker.data.naming import in_order, natural_key
from vit_tucker.data.splits import choose_classes, inferred_classes, open_split, open_splits
from vit_tucker.errors import DataError
from vit_tucker.storage.run_files import classes_text


def test_the_order_is_a_function_of_the_names_alone():
    names = ["A", "a", "01", "1", "b10", "b9", "B9", "x²", "٣", "3", "", "éa", "É"]
    order = in_order(names)
    for seed in range(20):
        random.Random(seed).shuffle(names)
        assert in_order(names) == order
        assert in_order(set(names)) == order
    assert order.index("b9") < order.index("b10")
    assert (order.index("01"), order.index("A")) == (order.index("1") - 1, order.index("a") - 1)
    for name in ("n02085620", "b10c2", "A-7", "12"):
        assert natural_key(name) == timms_key(name)  # folders that were in order stay in it
    assert all(in_order(pair) == in_order(pair[::-1]) for pair in itertools.permutations(names, 2))


def test_a_split_that_lacks_a_class_has_the_numbers_of_training(tmp_path):
    tree(tmp_path, ["train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/1.png", "val/a/1.png"])
    val = opened(tmp_path, "val")
    assert val.class_names == ("a", "b", "c")
    assert classes_of(val) == {"a/1.png": "a", "c/1.png": "c"}
    assert val.labels.tolist() == [0, 2]
    assert val.notes == ("split 'val': no images of 1 of 3 classes: b",)
    stored = open_split(folder_config(tmp_path), "val", False, 3, classes=["c", "b", "a"])
    assert stored.labels.tolist() == [2, 0]


def test_a_class_that_training_lacks_is_refused_with_the_nearest_name(tmp_path):
    tree(tmp_path, ["train/wren/1.png", "train/owl/1.png", "val/wrenn/1.png", "val/owl/1.png"])
    with pytest.raises(DataError) as caught:
        opened(tmp_path, "val")
    assert str(caught.value).startswith(
        "split 'val' has a class that the training split 'train' lacks: wrenn; it has 2: owl, wren;"
    )
    assert str(caught.value).endswith("did you mean 'wren'?")


def test_a_lone_validation_split_is_numbered_in_its_own_order(tmp_path):
    tree(tmp_path, ["val/b/1.png", "val/a/1.png"])
    val = opened(tmp_path, "val")
    assert val.class_names == ("a", "b")
    assert "no training split 'train'" in val.notes[0]
    data = folder_config(tmp_path)
    assert choose_classes(data, None, None, 2, False)[0] == ("a", "b")
    assert "taken in their own order (a, b)" in choose_classes(data, None, None, 2, False)[1][0]
    with pytest.raises(
        DataError, match=r"has 2 classes \(a, b\) and the model 3, and there is no training split 'train'"
    ):
        choose_classes(data, None, ["x", "y", "z"], 3, False)


def test_which_class_map_scores_a_model(tmp_path):
    tree(tmp_path, ["train/a/1.png", "train/b/1.png", "val/b/1.png"])
    data = folder_config(tmp_path)
    assert choose_classes(data, ["z", "b"], ["b"], 2, True) == (("z", "b"), [])  # of the run itself
    assert choose_classes(data, None, ["b", "z"], 2, False) == (("b", "z"), [])  # of the model
    assert choose_classes(data, ["y", "z"], ["x"], 2, False) == (None, [])  # of the training split
    mapped = folder_config(tmp_path, class_map={"b": 0})
    assert choose_classes(mapped, ["a", "b"], None, 2, True) == (None, [])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("m.txt", "owl\nwren\n", {"owl": 0, "wren": 1}),
        ("m.txt", "\ufeffowl\r\n\r\nwren\r\n\n", {"owl": 0, "wren": 1}),  # a byte order mark and blank lines
        ("m.txt", "wren 1\nbarn owl 0\n", {"wren": 1, "barn owl": 0}),
        ("m.txt", "owl 2\nwren\n", {"owl 2": 0, "wren": 1}),
        ("m.json", '["owl", "wren"]', {"owl": 0, "wren": 1}),
        ("m.json", '\ufeff{"wren": 1, "owl": 0}', {"wren": 1, "owl": 0}),
        ("m.json", '{"wren": 0, "wren2": 0, "owl": 1}', {"wren": 0, "wren2": 0, "owl": 1}),
    ],
)
def test_class_maps_from_files(tmp_path, name, content, expected, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    file = root / name
    file.write_text(content, encoding="utf-8")
    assert read_class_map(str(file), []) == expected
    assert read_class_map(name, [tmp_path, root]) == expected
    monkeypatch.chdir(root)
    assert read_class_map(name, []) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.txt", "owl\nowl\n", "the class 'owl' is there twice, with the numbers 0 and 1"),
        ("m.txt", "owl 0\nwren 2\n", "numbers must go from 0 to 2 without gaps; no class has 1"),
        ("m.txt", "\n", "has no classes"),
        ("m.json", '{"owl": 0, "owl": 1}', "the class 'owl' is there twice"),
        ("m.json", '{"owl": "0"}', "'owl' has '0' in the place of a number"),
        ("m.json", '{"owl": -1}', "'owl' has -1 in the place of a number"),
        ("m.json", "[1, 2]", "expected a list of names, or an object"),
        ("m.json", "{", "can't be read"),
        ("m.pkl", "x", r"a class map is a .txt or .json file, or a dict in the config; nothing is unpickled"),
        ("m.csv", "x", r"a class map is a .txt or .json file"),
    ],
)
def test_bad_class_maps_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_class_map(name, [tmp_path])
    assert str(caught.value).startswith(f"data.class_map: {tmp_path / name}: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"data.class_map: nope.txt: no such file; searched"):
        read_class_map("nope.txt", [tmp_path])


@pytest.mark.parametrize("way", ["key", "timm", "file"])
def test_the_class_map_of_the_config_wins_and_says_what_it_leaves_out(tmp_path, way):
    tree(tmp_path, ["train/a/1.png", "train/b/1.png", "train/c/1.png", "train/c/2.png", "val/c/1.png", "val/b/1.png"])
    (tmp_path / "map.txt").write_text("b\na\n")
    own = {"class_map": {"b": 0, "a": 1} if way == "key" else "map.txt"}
    options = {"dataset_kwargs": own} if way == "timm" else own
    data = folder_config(tmp_path, **options)
    train, val, classes, notes = open_splits(data, 3, num_classes=2)
    assert classes == ("b", "a")
    assert classes_of(train) == {"a/1.png": "a", "b/1.png": "b"}
    assert val.labels.tolist() == [0]
    assert "split 'train': data.class_map leaves out 2 of 4 images, of 1 classes: c" in notes
    assert inferred_classes(data) == 2
    with pytest.raises(
        DataError, match=r"data.class_map has none of the 3 classes of split 'train': it has x, the split a, b, c"
    ):
        open_split(folder_config(tmp_path, class_map={"x": 0}), "train", True, 3)


def test_the_number_of_classes_is_counted_and_checked(tmp_path):
    tree(tmp_path, ["train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/1.png"])
    data = folder_config(tmp_path)
    assert inferred_classes(data) == 3
    line = "classes: 3 (a, b, c); with images: 3 in split 'train', 1 in split 'validation'"
    assert open_splits(data, 3, num_classes=3).notes[-1] == line
    assert open_splits(data, 3, num_classes=5).notes[-1] == f"{line}; the model has 5, 2 of them never seen"
    with pytest.raises(DataError, match=r"split 'train': label 2 of .*/train/c/1.png, but there are 2 classes, 0 to 1"):
        open_splits(data, 3, num_classes=2)


def test_stored_maps_come_back_and_changes_are_named(tmp_path):
    names = ("Öl", "a", "A b")
    assert stored_classes(tmp_path) is None
    (tmp_path / "classes.json").write_text(classes_text(names), encoding="utf-8")
    assert stored_classes(tmp_path) == names
    assert json.loads((tmp_path / "classes.json").read_text(encoding="utf-8")) == {"Öl": 0, "a": 1, "A b": 2}
    refuse_changed(names, names, "train")
    with pytest.raises(DataError, match=r"classes.json that the run began with \(3\): new: b; missing: a"):
        refuse_changed(("Öl", "b", "A b"), names, "train")
    with pytest.raises(DataError, match=r"class 0 is 'a' now, 'Öl' there"):
        refuse_changed(("a", "Öl", "A b"), names, "train")


def test_names_of_classes_that_the_data_lack():
    assert padded(["a", "3"], 4) == ("a", "3", "2", "class 3")
    assert unpadded(padded(["a", "3"], 4)) == ("a", "3")
    assert unpadded(["0", "1"]) == ("0", "1")
