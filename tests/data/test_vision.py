"""torchvision's sets (torch/) in their real layouts: splits, names of classes, labels, images as stored."""

import hashlib

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from PIL import Image

from tests.data.test_datasets import idx, write_cifar
from vit_tucker.config.schema import DataConfig
from vit_tucker.data.labels import class_names, labels_of
from vit_tucker.data.splits import open_split, open_splits
from vit_tucker.errors import DataError


def config(name, root, **data):
    return DataConfig(dataset=f"torch/{name}", root=str(root), **data)


def opened(name, root, split="train", **data):
    return open_split(config(name, root, **data), split, False, 3)


def write_images(root, folders, mode="RGB", ending="JPEG"):
    for folder in folders:
        (root / folder).mkdir(parents=True)
        if mode == "I;16":
            Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(root / folder / f"0.{ending}")
        else:
            Image.new(mode, (4, 4)).save(root / folder / f"0.{ending}")


def test_imagenets_names_are_strings(tmp_path):
    wnids = {"n01440764": ("tench", "Tinca tinca"), "n01443537": ("goldfish", "Carassius auratus")}
    torch.save((wnids, []), tmp_path / "meta.bin")
    write_images(tmp_path, [f"{split}/{wnid}" for split in ("train", "val") for wnid in wnids])
    for split in ("train", "val", "validation"):
        data = opened("imagenet", tmp_path, split)
        assert class_names(data) == ("tench, Tinca tinca", "goldfish, Carassius auratus")
        assert [label for _, label in (data[0], data[1])] == labels_of(data).tolist() == [0, 1]
    for split in ("test", "trian"):
        with pytest.raises(
            DataError, match=rf"^torch/imagenet has no split '{split}', known: train, val, valid, validation"
        ):
            opened("imagenet", tmp_path, split)
    with pytest.raises(DataError, match=r"^split 'train': label 1 of .*n01443537/0.JPEG, but there are 1 classes"):
        open_splits(config("imagenet", tmp_path), 3, num_classes=1)


def write_mnist(folder, prefixes, labels):
    folder.mkdir(parents=True, exist_ok=True)
    for images, targets in prefixes:
        (folder / images).write_bytes(idx(np.zeros((len(labels), 28, 28), np.uint8)))
        (folder / targets).write_bytes(idx(np.array(labels, np.uint8)))


MNIST_FILES = [(f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte") for prefix in ("train", "t10k")]


@pytest.mark.parametrize(
    ("name", "folder", "first"),
    [("mnist", "MNIST", "0 - zero"), ("kmnist", "KMNIST", "o"), ("fashion_mnist", "FashionMNIST", "T-shirt/top")],
)
def test_mnist_and_its_kin(tmp_path, name, folder, first):
    write_mnist(tmp_path / folder / "raw", MNIST_FILES, [3, 1, 9])
    data = opened(name, tmp_path)
    assert class_names(data)[0] == first
    assert len(class_names(data)) == 10
    assert labels_of(data).tolist() == [3, 1, 9]
    image, label = data[0]
    assert (image.mode, image.size, label) == ("RGB", (28, 28), 3)
    for split in ("test", "validation", "training"):
        assert len(opened(name, tmp_path, split)) == 3
    with pytest.raises(
        DataError, match=rf"^torch/{name} has no split 'tran', known: train, .*; did you mean 'train'\?$"
    ):
        opened(name, tmp_path, "tran")  # timm reads the test set for any word that it does not know
    with pytest.raises(DataError, match="label 9 of image 2, but there are 5 classes"):
        open_splits(config(name, tmp_path), 3, num_classes=5)


def test_qmnists_labels_have_the_writers_too(tmp_path):
    folder = tmp_path / "QMNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        (folder / f"qmnist-{part}-images-idx3-ubyte").write_bytes(idx(np.zeros((2, 28, 28), np.uint8)))
        table = np.array([[4, 9, 9, 9, 9, 9, 9, 9], [2, 9, 9, 9, 9, 9, 9, 9]], ">i4")
        header = bytes([0, 0, 12, 2]) + np.array(table.shape, ">u4").tobytes()
        (folder / f"qmnist-{part}-labels-idx2-int").write_bytes(header + table.tobytes())
    data = opened("qmnist", tmp_path)
    assert labels_of(data).tolist() == [data[0][1], data[1][1]] == [4, 2]
    assert class_names(data)[4] == "4 - four"


def test_cifars_names(tmp_path, monkeypatch):
    write_cifar(tmp_path, "cifar10", monkeypatch)
    data = opened("cifar10", tmp_path, "test")
    assert class_names(data) == tuple("abcdefghij")
    assert labels_of(data).tolist() == [5, 9, 2, 6]
    with pytest.raises(DataError, match="torch/cifar10 has no split 'extra'"):
        opened("cifar10", tmp_path, "extra")


def test_places365(tmp_path, monkeypatch):
    def write(file, text):
        (tmp_path / file).write_text(text)
        return file, hashlib.md5(text.encode()).hexdigest()

    monkeypatch.setattr(
        tv.Places365, "_CATEGORIES_META", write("categories_places365.txt", "/a/airfield 0\n/b/bar 1\n")
    )
    lists = {
        "train-standard": write("places365_train_standard.txt", "/a/airfield/1.jpg 0\n/b/bar/1.jpg 1\n"),
        "test": write("places365_test.txt", "Places365_test_1.jpg\n"),
    }
    monkeypatch.setattr(tv.Places365, "_FILE_LIST_META", lists)
    data = opened("places365", tmp_path)
    assert class_names(data) == ("/a/airfield", "/b/bar")
    assert labels_of(data).tolist() == [0, 1]
    with pytest.raises(DataError, match="torch/places365 has no split 'test'"):  # which has no labels
        opened("places365", tmp_path, "test")


def test_inaturalists_names(tmp_path):
    kinds = [f"{number:05d}_Animalia_Chordata_Aves_Order_Family_Genus_species{number}" for number in range(2)]
    write_images(tmp_path / "2021_train", kinds, ending="jpg")
    data = opened("inaturalist", tmp_path)
    assert class_names(data) == tuple(kinds)
    assert labels_of(data).tolist() == [label for _, label in (data[0], data[1])]
    with pytest.raises(
        DataError, match="data set 'torch/inaturalist' .* can't be opened: ValueError: Unknown value '2021_tra'"
    ):
        opened("inaturalist", tmp_path, "2021_tra")


def test_folders_of_torchvision_need_the_split(tmp_path):
    write_images(tmp_path, ["train/a", "train/b"], mode="I;16", ending="png")
    data = opened("folder", tmp_path)
    assert class_names(data) == ("a", "b")
    assert data[0][0].getpixel((0, 0)) == (128, 128, 128)  # torchvision's own loader makes it white
    with pytest.raises(DataError, match=r"torch/folder: no image folder for split 'validation', searched .*<class>"):
        opened("folder", tmp_path, "validation")  # timm would read the root
    with pytest.raises(DataError, match="trust_remote_code: code of a data set is never run"):
        opened("folder", tmp_path, dataset_kwargs={"trust_remote_code": True})
