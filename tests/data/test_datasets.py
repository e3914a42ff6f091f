"""Each data set's loading code, on files of the real format."""

import gzip
import hashlib
import io
import pickle
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets as tv
from PIL import Image

from vit_tucker.config.schema import DataConfig
from vit_tucker.data.datasets import dataset_info, load_dataset, subset
from vit_tucker.data.idx import read_idx
from vit_tucker.data.split_source import SplitSource
from vit_tucker.data.splits import open_split
from vit_tucker.errors import DataError

RNG = np.random.default_rng(0)


def load(name, split="train", mode="RGB", root="nowhere", **options):
    if name in ("folder", "imagenet") or name.startswith(("wds/", "hfds/")):
        return open_split(DataConfig(dataset=name, root=str(root)), split, split == "train", 3)
    return load_dataset(SplitSource(name, split, "train", mode, Path(root), options=options), split == "train")


def test_digits_split_is_fixed_and_stratified():
    train, test = load("digits", mode="L"), load("digits", "validation", mode="L")
    assert (len(train), len(test)) == (1437, 360)
    for part in (train, test):
        shares = np.bincount(part.labels) / len(part)
        assert np.abs(shares - 0.1).max() < 0.005
    assert (
        hashlib.sha256(test.images.tobytes()).hexdigest()
        == hashlib.sha256(load("digits", "validation").images).hexdigest()
    )
    together = {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}
    assert not together
    image, label = train[0]
    assert (image.mode, image.size, type(label)) == ("L", (8, 8), int)
    assert load("digits")[0][0].mode == "RGB"
    info = dataset_info("digits")
    assert train.images.mean() / 255 == pytest.approx(info.mean[0], abs=2e-4)
    assert train.images.std() / 255 == pytest.approx(info.std[0], abs=2e-4)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion(folder, suffix="", train=5, labels=None):
    folder.mkdir(parents=True)
    pack = gzip.compress if suffix else bytes
    images = RNG.integers(0, 256, (train, 28, 28), dtype=np.uint8)
    classes = np.arange(train if labels is None else labels, dtype=np.uint8)
    for prefix in ("train", "t10k"):
        (folder / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
        (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(classes)))
    return images


@pytest.mark.parametrize(
    ("folder", "suffix"), [("FashionMNIST/raw", ""), ("FashionMNIST/raw", ".gz"), ("fashion_mnist", ".gz"), (".", "")]
)
def test_fashion_mnist_layouts(tmp_path, folder, suffix):
    images = write_fashion(tmp_path / "root" / folder, suffix)
    data = load("fashion_mnist", mode="L", root=tmp_path / "root")
    assert len(data) == 5
    assert np.array_equal(np.asarray(data[3][0]), images[3])
    assert data[3][1] == 3


def test_fashion_mnist_missing_or_malformed(tmp_path, monkeypatch):
    monkeypatch.setattr("vit_tucker.data.datasets.DEBIAN_FASHION_MNIST", tmp_path / "debian")
    with pytest.raises(
        DataError, match=rf"not found, searched {tmp_path}/FashionMNIST/raw, .*data.download=true.*Debian package"
    ):
        load("fashion_mnist", root=tmp_path)
    write_fashion(tmp_path / "debian", ".gz", labels=4)
    with pytest.raises(DataError, match=rf"not found, searched {tmp_path}/FashionMNIST/raw, .* left at data$"):
        load("fashion_mnist", root=tmp_path)  # a folder that the user names is not left for the system's
    with pytest.raises(DataError, match="5 train images but 4 labels"):
        load("fashion_mnist", root="data")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\x00\x08\x03abc", "not an IDX file of 3-dimensional"),
        (idx(np.zeros(4, np.uint8)), "not an IDX file of 3-dimensional"),
        (idx(np.zeros((2, 3, 3), np.uint8))[:-1], "truncated: 17 bytes of data, its header promises 18"),
    ],
)
def test_idx_files_are_checked(tmp_path, content, message):
    file = tmp_path / "x"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(file, 3)
    packed = tmp_path / "x.gz"
    packed.write_bytes(gzip.compress(content)[:-3])
    with pytest.raises(DataError, match="can't be read"):
        read_idx(packed, 3)


def write_cifar(root, name, monkeypatch, train=(3, 1, 4, 1), test=(5, 9, 2, 6)):
    """Python pickles of (n, 3072) arrays in the archive's layout; torchvision checks their MD5, here that of ours."""
    cls = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[name]
    folder = root / cls.base_folder
    folder.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (len(train), 3072), dtype=np.uint8)
    key = "labels" if name == "cifar10" else "fine_labels"

    def write(file, content):
        data = pickle.dumps(content)
        (folder / file).write_bytes(data)
        return [file, hashlib.md5(data).hexdigest()]

    for split, labels in (("train_list", train), ("test_list", test)):
        batches = [write(file, {"data": pixels[: len(labels)], key: list(labels)}) for file, _ in getattr(cls, split)]
        monkeypatch.setattr(cls, split, batches)
    names = {"label_names": list("abcdefghij"), "fine_label_names": list("abcdefghij")}
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": write(cls.meta["filename"], names)[1]})
    return pixels


@pytest.mark.parametrize(
    ("name", "folder", "batches"), [("cifar10", "cifar-10-batches-py", 5), ("cifar100", "cifar-100-python", 1)]
)
def test_cifar_in_its_real_format(tmp_path, monkeypatch, name, folder, batches):
    with pytest.raises(
        DataError, match=rf"{name} not found or not intact, searched {tmp_path / folder}; .*download=true, or unpack"
    ):
        load(name, root=tmp_path)
    pixels = write_cifar(tmp_path, name, monkeypatch)
    train = load(name, root=tmp_path)
    assert len(train) == 4 * batches
    assert train[2][1] == 4
    assert np.array_equal(np.asarray(train[1][0]), pixels[1].reshape(3, 32, 32).transpose(1, 2, 0))
    assert load(name, "validation", root=tmp_path)[1][1] == 9


def write_folder(root, splits=("train", "val"), classes=("n01", "n02"), count=3):
    for split in splits:
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 16), (60 * number, 10 * i, 0)).save(root / split / name / f"{i}.JPEG")


@pytest.mark.parametrize("below", ["imagenet", "."])
def test_imagenet_folder(tmp_path, below):
    write_folder(tmp_path / "root" / below)
    train = load("imagenet", root=tmp_path / "root")
    test = load("imagenet", "validation", root=tmp_path / "root")
    assert (len(train), len(test)) == (6, 6)
    image, label = train[5]
    assert (image.size, label) == ((20, 16), 1)


def test_missing_image_folder_says_where_it_looked(tmp_path):
    for name in ("imagenet", "folder"):
        with pytest.raises(
            DataError, match=rf"no image folder for split 'train', searched {tmp_path} \(expected .*<class>"
        ):
            load(name, root=tmp_path)
    write_folder(tmp_path, splits=("train",))
    with pytest.raises(DataError, match="no image folder for split 'validation'"):
        load("imagenet", "validation", root=tmp_path)  # timm's reader would quietly take the training images


def write_shards(root, sizes=(3, 2)):
    """A webdataset in timm's layout: tar shards and an _info.json that names their sizes."""
    import json

    root.mkdir(parents=True, exist_ok=True)
    info = {"splits": {}}
    for split in ("train", "validation"):
        number = 0
        for shard, size in enumerate(sizes):
            with tarfile.open(root / f"{split}-{shard:04d}.tar", "w") as tar:
                for _ in range(size):
                    image = io.BytesIO()
                    Image.new("RGB", (16, 16), (number * 20, 0, 0)).save(image, "PNG")
                    for suffix, content in (("png", image.getvalue()), ("cls", str(number % 2).encode())):
                        member = tarfile.TarInfo(f"sample{number:04d}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
                    number += 1
        info["splits"][split] = {
            "name": split,
            "num_samples": sum(sizes),
            "filenames": [f"{split}-{shard:04d}.tar" for shard in range(len(sizes))],
            "shard_lengths": list(sizes),
        }
    (root / "_info.json").write_text(json.dumps(info))


def test_webdataset(tmp_path):
    write_shards(tmp_path)
    data = load("wds/", "validation", root=tmp_path)
    assert [label for _, label in data] == [0, 1, 0, 1, 0]


def test_hugging_face_dataset(tmp_path, monkeypatch):
    write_folder(tmp_path / "images", splits=("train", "test"))
    data = load(f"hfds/{tmp_path}/images", "test", root=tmp_path / "cache")
    assert len(data) == 6
    image, label = data[5]
    assert (image.size, label) == ((20, 16), 1)


def test_unreadable_factory_names_say_why(tmp_path):
    with pytest.raises(DataError, match=r"unknown data set 'digit', known: .*did you mean 'digits'"):
        load("digit")
    with pytest.raises(
        DataError, match=r"data set 'torch/nope' .*can't be opened: AssertionError: Unknown torchvision"
    ):
        load("torch/nope", root=tmp_path)
    with pytest.raises(
        DataError, match=r"wds/, split 'train': no _info.json in .* lists its shards; name them by a pattern"
    ):
        load("wds/", root=tmp_path)


def test_misspelt_splits_are_not_the_test_set():
    for name in ("digits", "fashion_mnist", "cifar10"):
        with pytest.raises(DataError, match=rf"{name} has no split 'trian', known: train, .*did you mean 'train'"):
            load(name, "trian")
    assert len(load("digits", "test")) == 360


@pytest.mark.parametrize(("name", "cls"), [("fashion_mnist", "FashionMNIST"), ("cifar10", "CIFAR10")])
def test_failing_downloads_are_one_line(tmp_path, monkeypatch, name, cls):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(tv, cls, type(cls, (), {"__init__": fail, "base_folder": "x"}))
    with pytest.raises(DataError, match=f"can't be downloaded to {tmp_path}: no network"):
        load(name, root=tmp_path, download=True)


def test_subset_is_fixed_and_bounded():
    data = load("digits")
    part = subset(data, 100)
    assert len(part) == 100
    assert part.indices == subset(data, 100).indices == subset(data, 200).indices[:100]
    assert subset(data, None) is data
    with pytest.raises(DataError, match="num_samples=2000: the training split has 1437"):
        subset(data, 2000)


@pytest.mark.parametrize(
    ("name", "package"), [("wds/x", "webdataset"), ("hfds/x", "datasets"), ("hfids/x", "datasets")]
)
def test_a_package_that_is_missing_is_one_line_with_its_extra(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    wanted = rf"needs the package {package}: pip install 'vit_tucker\[data\]' \(in a clone: \./run\.sh setup data\)$"
    with pytest.raises(DataError, match=wanted):
        open_split(DataConfig(dataset=name, root=str(tmp_path)), "train", False, 3)
