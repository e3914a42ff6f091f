"""Hugging Face's `datasets`: columns, labels and splits are looked at before anything is read."""

import io

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from tests.data.test_streams import build
from vit_tucker.config.schema import DataConfig
from vit_tucker.data.labels import class_names
from vit_tucker.data.samples import calibration_images, evaluation_images
from vit_tucker.data.splits import open_split, open_splits, split_notes
from vit_tucker.errors import DataError

KINDS = ("hfds", "hfids")
RESOLVED = {"input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3}
RESOLVED |= {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}


@pytest.fixture(autouse=True)
def _quiet():
    import datasets

    datasets.disable_progress_bars()


def stored(number):
    """An image as `datasets` stores it; its red channel is the number of the image."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{number}.png"}


def write(folder, split, labels, feature, image="image", label="label"):
    """One parquet file of a split, by `datasets`' own writer, its Features in the metadata."""
    folder.mkdir(exist_ok=True, parents=True)
    columns = {image: [stored(number) for number in range(len(labels))], label: labels}
    features = {image: ImageFeature(), label: feature}
    Dataset.from_dict(columns, features=Features(features)).to_parquet(folder / f"{split}.parquet")
    return folder


def config(tmp_path, kind="hfds", folder="set", **data):
    options = {"dataset": f"{kind}/{tmp_path / folder}", "root": str(tmp_path / "cache"), "val_split": "test"}
    return DataConfig(**{**options, **data})


def opened(tmp_path, split="train", kind="hfds", classes=None, num_classes=None, **data):
    return open_split(config(tmp_path, kind, **data), split, False, 3, classes=classes, num_classes=num_classes)


def labels_of(dataset):
    return [label for _, label in (dataset if kind_of(dataset) else (dataset[i] for i in range(len(dataset))))]


def kind_of(dataset):
    return isinstance(dataset, torch.utils.data.IterableDataset)


def write_cifar100(tmp_path):
    """The columns of uoft-cs/cifar100."""
    for split in ("train", "test"):
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        Dataset.from_dict(
            {"img": [stored(i) for i in range(4)], "fine_label": [0, 1, 2, 1], "coarse_label": [0, 1, 1, 1]},
            features=Features(
                img=ImageFeature(),
                fine_label=ClassLabel(names=["apple", "bear", "bee"]),
                coarse_label=ClassLabel(names=["food", "animals"]),
            ),
        ).to_parquet(folder / f"{split}.parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_columns_are_one_line_that_says_what_to_set(tmp_path, kind):
    write_cifar100(tmp_path)
    columns = "img (Image), fine_label (ClassLabel of 3), coarse_label (ClassLabel of 2)"
    with pytest.raises(DataError) as caught:
        opened(tmp_path, kind=kind)
    message = str(caught.value)
    assert (
        f"{kind}/{tmp_path}/set, split 'train' has no column 'image' for the images and has no column 'label' for the labels"
        in message
    )
    assert message.endswith(
        f"; its columns are: {columns}; set data.dataset_kwargs={{input_key: img, target_key: fine_label}}"
    )
    with pytest.raises(DataError, match=r"set data.dataset_kwargs=\{input_key: img, target_key: fine_label\}$"):
        opened(tmp_path, kind=kind, dataset_kwargs={"input_key": "img"})  # what is right already stays in the line
    for label, expected in (("fine_label", [0, 1, 2, 1]), ("coarse_label", [0, 1, 1, 1])):
        data = opened(tmp_path, kind=kind, dataset_kwargs={"input_key": "img", "target_key": label})
        assert labels_of(data) == expected
    with pytest.raises(DataError, match=r"no images in column 'fine_label' but ClassLabel of 3; .*input_key: img"):
        opened(tmp_path, kind=kind, dataset_kwargs={"input_key": "fine_label", "target_key": "fine_label"})


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_columns_stop_training_evaluation_and_calibration(tmp_path, kind):
    write_cifar100(tmp_path)
    data = config(tmp_path, kind)
    for start in (
        lambda: build(tmp_path / "cache", dataset=data.dataset, val_split="test"),  # of train, --dry-run and evaluate
        lambda: next(calibration_images(data, RESOLVED, 2, 2, 0)),
        lambda: next(evaluation_images(data, RESOLVED, 2, 2)),
    ):
        with pytest.raises(
            DataError, match=r"^hfi?ds/.*set data.dataset_kwargs=\{input_key: img, target_key: fine_label\}$"
        ):
            start()


@pytest.mark.parametrize("kind", KINDS)
def test_mnists_columns_pass(tmp_path, kind):
    write(tmp_path / "set", "train", [7, 0], ClassLabel(num_classes=10))
    data = opened(tmp_path, kind=kind, num_classes=10)
    assert labels_of(data) == [7, 0]
    assert class_names(data) == tuple("0123456789")
    image, _ = next(iter(data)) if kind == "hfids" else data[0]
    assert (image.mode, image.size) == ("RGB", (8, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_names_as_labels_are_numbered_in_natural_order_by_the_training_split(tmp_path, kind):
    write(tmp_path / "set", "train", ["10", "B", "9", "b", "9"], Value("string"))
    write(tmp_path / "set", "test", ["b", "10"], Value("string"))
    data = config(tmp_path, kind)
    train, test = (open_split(data, split, False, 3) for split in ("train", "test"))
    assert class_names(train) == class_names(test) == ("9", "10", "B", "b")
    assert (labels_of(train), labels_of(test)) == ([1, 2, 0, 3, 0], [3, 1])
    # a stored class map goes before the files'
    assert labels_of(open_split(data, "test", False, 3, classes=["b", "9", "10", "B"])) == [0, 2]
    write(tmp_path / "set", "test", ["b", "C"], Value("string"))
    with pytest.raises(
        DataError, match=r"column 'label' of .* split 'test': image 1|1.png .*'C', which is none of the 4 classes"
    ):
        labels_of(opened(tmp_path, "test", kind, root=str(tmp_path / "other")))


@pytest.mark.parametrize("kind", KINDS)
def test_class_labels_that_differ_between_splits_are_mapped_by_name(tmp_path, kind):
    write(tmp_path / "set", "train", [0, 1, 2], ClassLabel(names=["cat", "dog", "emu"]))
    write(
        tmp_path / "set", "test", [0, 1, 1], ClassLabel(names=["dog", "cat"])
    )  # `datasets` itself calls the first one cat
    data = config(tmp_path, kind)
    train = open_split(data, "train", False, 3)
    test = open_split(data, "test", False, 3)
    assert labels_of(train) == [0, 1, 2]
    assert labels_of(test) == [1, 0, 0]
    assert class_names(train) == class_names(test) == ("cat", "dog", "emu")
    if kind == "hfds":
        assert split_notes(train) == ()
        assert split_notes(test) == ("split 'test': no images of 1 of 3 classes: emu",)
    write(tmp_path / "set", "test", [0, 1], ClassLabel(names=["dog", "yak"]))
    with pytest.raises(DataError, match="is of class 'yak', which is none of the 3 classes of the training split"):
        labels_of(opened(tmp_path, "test", kind, root=str(tmp_path / "other")))


def test_files_of_one_split_that_number_classes_differently_are_refused(tmp_path):
    for number, names in enumerate((["a", "b"], ["b", "a"])):
        write(tmp_path / "set" / "train", f"train-{number}", [0, 1], ClassLabel(names=names))
    with pytest.raises(DataError, match=r"numbers its classes in train-0.parquet as a, b, in train-1.parquet as b, a"):
        opened(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0.5, 1.0], Value("float32"), "no class numbers or names in column 'label' but float32; its columns are"),
        ([[0, 1], [1]], [ClassLabel(names=["a", "b"])], "in column 'label' but (List|Sequence|list)"),
    ],
)
def test_labels_that_are_no_classes_are_refused_at_once(tmp_path, kind, labels, feature, message):
    write(tmp_path / "set", "train", labels, feature)
    with pytest.raises(DataError, match=message):
        opened(tmp_path, kind=kind)


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        (
            [0, -1, -1],
            ClassLabel(names=["a", "b"]),
            r"split 'test': label -1 of {image} \(column 'label' of .*\): labels begin with 0",
        ),
        ([0, None, 1], ClassLabel(names=["a", "b"]), r"column 'label' of .*, split 'test': {image} has no label"),
        (
            [0, 1, 3],
            Value("int64"),
            r"split 'test': label 3 of {image} \(column 'label' of .*\), but there are 3 classes, 0 to 2",
        ),
    ],
)
def test_labels_beyond_the_classes_are_refused_before_the_first_step(tmp_path, labels, feature, message):
    write(tmp_path / "set", "train", [0, 1, 1], feature)
    write(tmp_path / "set", "test", labels, feature)
    # map-style: when it is opened, without decoding an image
    with pytest.raises(DataError, match="^" + message.format(image=r"image [12]( \(and 1 more\))?")):
        open_splits(config(tmp_path), 3, num_classes=3)
    # a stream: when it is met, by its name, whatever data.max_bad_images
    loaders = build(
        tmp_path / "cache", dataset=f"hfids/{tmp_path}/set", val_split="test", limit=9, with_train=False, num_classes=3
    )
    with pytest.raises(DataError, match="^" + message.format(image="[12].png")):
        list(loaders.eval)
    assert labels_of(opened(tmp_path, "train", num_classes=2)) == [0, 1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_map_numbers_names_and_numbers(tmp_path, kind):
    write(tmp_path / "set", "train", [0, 1, 2], ClassLabel(names=["cat", "dog", "car"]))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "map.txt").write_text("\ufeffcar\ncat\ndog\n", encoding="utf-8")
    assert labels_of(opened(tmp_path, kind=kind, class_map="map.txt")) == [1, 2, 0]
    for numbers in ({"cat": 1, "dog": 1, "car": 0}, {"0": 1, "1": 1, "2": 0}):
        data = opened(tmp_path, kind=kind, dataset_kwargs={"class_map": numbers})
        assert labels_of(data) == [1, 1, 0]
    data = config(tmp_path, kind, class_map={"cat": 0, "dog": 1})
    if kind == "hfids":
        with pytest.raises(
            DataError, match="2.png has the label 'car', which data.class_map lacks; did you mean 'cat'"
        ):
            labels_of(open_split(data, "train", False, 3))
        return
    chosen = open_split(data, "train", False, 3)
    assert labels_of(chosen) == [0, 1]
    assert split_notes(chosen) == ("split 'train': data.class_map leaves out 1 of 3 images, of 1 classes: car",)
    with pytest.raises(
        DataError, match="data.class_map has none of its 3 classes: it has bus, the split car, cat, dog"
    ):
        open_split(config(tmp_path, kind, class_map={"bus": 0}), "train", False, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_splits_go_by_their_exact_names(tmp_path, kind):
    feature = ClassLabel(names=["a", "b"])
    write(tmp_path / "set", "train", [0, 1], feature)
    write(tmp_path / "set", "validation", [1, 1], feature)
    with pytest.raises(
        DataError, match=r"has no split 'val', there are: train, validation; did you mean 'validation'\?$"
    ):
        opened(tmp_path, "val", kind)
    assert labels_of(opened(tmp_path, "validation", kind)) == [1, 1]
    write(tmp_path / "set", "val", [0, 0], feature)  # `datasets` would read both as one split
    with pytest.raises(DataError, match=r"split 'validation' would be made of files by different names, .*val.parquet"):
        opened(tmp_path, "validation", kind)
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - split: {name}\n    path: {name}.parquet\n" for name in ("train", "val", "validation"))
        + "---\n"
    )
    for name, expected in (("val", [0, 0]), ("validation", [1, 1])):
        assert labels_of(opened(tmp_path, name, kind, root=str(tmp_path / "other"))) == expected


def test_nothing_of_a_data_set_is_executed_and_options_are_checked(tmp_path):
    write(tmp_path / "set", "train", [0], ClassLabel(names=["a"]))
    for kind in (*KINDS, "wds", "tfds", "torch"):
        with pytest.raises(DataError, match="trust_remote_code: code of a data set is never run"):
            opened(tmp_path, kind=kind, dataset_kwargs={"trust_remote_code": True})
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass A: pass\n")
    for kind in KINDS:
        with pytest.raises(DataError, match="can't be opened: .*[Ss]cript"):
            opened(tmp_path, kind=kind, folder="code")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(DataError, match=r"hfds/ has no option 'inptu_key', known: .*; did you mean 'input_key'\?"):
        opened(tmp_path, dataset_kwargs={"inptu_key": "image"})


def test_images_are_as_stored_whatever_the_column_is_made_of(tmp_path):
    folder = tmp_path / "set"
    write(folder, "train", [0, 1], ClassLabel(names=["a", "b"]))
    expected = [np.asarray(image) for image, _ in opened(tmp_path)]
    for number, (column, feature) in enumerate(
        (
            ([stored(i)["bytes"] for i in range(2)], Value("binary")),
            ([str(tmp_path / f"{i}.png") for i in range(2)], Value("string")),
            ([str(tmp_path / f"{i}.png") for i in range(2)], Value("large_string")),
        )
    ):
        for i in range(2):
            (tmp_path / f"{i}.png").write_bytes(stored(i)["bytes"])
        other = tmp_path / f"set{number}"
        other.mkdir()
        table = Dataset.from_dict(
            {"image": column, "label": [0, 1]}, features=Features(image=feature, label=Value("int64"))
        )
        table.to_parquet(other / "train.parquet")
        for kind in KINDS:
            images = opened(tmp_path, kind=kind, folder=other.name)
            found = [np.asarray(image) for image, _ in images]
            assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_images_go_through_the_one_conversion(tmp_path, kind):
    folder = tmp_path / "set"
    folder.mkdir()
    turned, deep = io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (8, 4)).save(turned, "JPEG", exif=exif)
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(deep, "PNG")
    columns = {"image": [{"bytes": file.getvalue(), "path": None} for file in (turned, deep)], "label": [0, 0]}
    features = Features(image=ImageFeature(), label=ClassLabel(names=["a"]))
    Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")
    for turn, size in ((False, (8, 4)), (True, (4, 8))):
        data = opened(tmp_path, kind=kind, exif_orientation=turn)
        first, second = (image for image, _ in (data if kind == "hfids" else (data[0], data[1])))
        assert first.size == size
        assert second.getpixel((0, 0)) == (128, 128, 128)
