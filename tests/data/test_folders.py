"""Trees of images as people have them: read as what they are, or refused with the layout found and the one expected."""

import os
import shutil

import numpy as np
import pytest
from timm.data.readers.reader_image_folder import find_images_and_targets

from tests.data.trees import classes_of, folder_config, image, opened, tree, write_csv, write_meta
from vit_tucker.config.schema import DataConfig
from vit_tucker.data.splits import open_split
from vit_tucker.errors import ConfigError, DataError

IDS = ["n01440764", "n01443537", "n02085620"]


def refusal(root, split="train", **data):
    with pytest.raises(DataError) as caught:
        opened(root, split, **data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_class_folders_with_one_image_at_least(tmp_path):
    tree(tmp_path / "train", ["cat/2.png", "cat/10.png", "dog/1.jpg"])
    (tmp_path / "train" / "empty").mkdir()
    data = opened(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.images == ("cat/2.png", "cat/10.png", "dog/1.jpg")  # as timm orders them
    assert data.labels.tolist() == [0, 0, 1]
    assert data.notes == ("split 'train': folders without images are no classes: empty",)


def test_tiny_imagenet_as_downloaded(tmp_path):
    for name in IDS:
        tree(tmp_path / "train" / name / "images", [f"{name}_{i}.JPEG" for i in range(2)])
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t62\n")
    tree(tmp_path / "val" / "images", [f"val_{i}.JPEG" for i in range(4)])
    order = [IDS[2], IDS[0], IDS[2], IDS[1]]
    rows = "".join(f"val_{i}.JPEG\t{name}\t0\t32\t44\t62\n" for i, name in enumerate(order))
    (tmp_path / "val" / "val_annotations.txt").write_text(rows)
    tree(tmp_path / "test" / "images", ["test_0.JPEG", "test_1.JPEG"])
    train, val = opened(tmp_path), opened(tmp_path, "val")
    assert train.class_names == val.class_names == tuple(IDS)
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert val.labels.tolist() == [2, 0, 2, 1]
    assert train.notes == ("split 'train': left out: 3 files that are no images (.txt 3)",)
    assert val.notes == (f"split 'val': classes by {tmp_path}/val/val_annotations.txt",)
    message = refusal(tmp_path, "test", train_split="test")
    assert message.startswith(
        f"split 'test': all 2 images lie directly in {tmp_path}/test/images, e.g. test_0.JPEG, so"
    )
    (tmp_path / "val" / "val_annotations.txt").unlink()  # one class "images" with 100%, it was
    assert "so that their classes are unknown; expected" in refusal(tmp_path, "val")
    (tmp_path / "val" / "val_annotations.txt").write_text("nonsense\n")
    assert "val_annotations.txt:1: expected a file name, a tab and a class" in refusal(tmp_path, "val")


def imagenet(tmp_path, root):
    """Two training classes and a flat validation folder; returns its images' names."""
    for name in IDS[:2]:
        tree(root / "train" / name, [f"{name}_{i}.JPEG" for i in range(2)])
    names = [f"ILSVRC2012_val_{i:08d}" for i in (1, 2, 3)]
    tree(root / "val", [f"{name}.JPEG" for name in names])
    return names


@pytest.mark.parametrize("place", ["val", ".", "..", "kaggle"])
def test_flat_imagenet_validation_by_kaggles_solution(tmp_path, place):
    root = tmp_path / "top" / "ILSVRC" / "Data" / "CLS-LOC" if place == "kaggle" else tmp_path / "top" / "imagenet"
    names = imagenet(tmp_path, root)
    assert "all 3 images lie directly in" in refusal(root, "val")
    rows = [
        (name, f"{wnid} 85 1 499 272 {wnid} 1 2 3 4 ")
        for name, wnid in zip(names, (IDS[1], IDS[0], IDS[1]), strict=True)
    ]
    folder = tmp_path / "top" if place == "kaggle" else root / place
    write_csv(folder / "LOC_val_solution.csv", ["ImageId", "PredictionString"], rows)
    data = opened(root, "val")
    assert data.class_names == tuple(IDS[:2])
    assert data.labels.tolist() == [1, 0, 1]


def test_flat_imagenet_validation_by_the_ground_truth(tmp_path):
    """Its numbers are ILSVRC2012_IDs, from 1 and in an order of their own: meta.mat names them."""
    root = tmp_path / "imagenet"
    imagenet(tmp_path, root)
    kit = root / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    truth = kit / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("2\n1\n2\n")
    assert "meta.mat of ImageNet's development kit, which names them, is not beside it" in refusal(root, "val")
    write_meta(kit, {1: IDS[1], 2: IDS[0]})
    assert opened(root, "val").labels.tolist() == [0, 1, 0]
    truth.write_text("2\n1\n")
    assert f"{truth} has 2 lines, none for image ILSVRC2012_val_00000003.JPEG" in refusal(root, "val")
    truth.write_text("2\n7\n1\n")
    assert f"{truth}:2: '7' is no number of a class in {kit}/meta.mat" in refusal(root, "val")
    (kit / "meta.mat").write_bytes(b"no mat file")
    assert "meta.mat: not the table of synsets" in refusal(root, "val")


@pytest.mark.parametrize("bom", [False, True])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_file_of_names(tmp_path, bom, delimiter):
    tree(tmp_path / "train", ["a.png", "b.png", "sub/c.png", "d.png"])
    rows = [("a.png", "wren"), ("train/b.png", "owl"), ("c", "owl"), ("gone.png", "owl"), ("val/e.png", "wren")]
    tree(tmp_path / "val", ["e.png"])
    write_csv(tmp_path / "labels.csv", ["filename", "label"], rows, bom, delimiter)
    data = opened(tmp_path, labels="labels.csv")
    assert classes_of(data) == {"a.png": "wren", "b.png": "owl", "sub/c.png": "owl"}
    assert data.class_names == ("owl", "wren")
    assert data.notes == (
        f"split 'train': classes by {tmp_path}/labels.csv",
        "split 'train': left out: 1 images without a row in labels.csv: d.png",
        "split 'train': 1 rows of labels.csv without an image: gone.png",
    )
    val = opened(tmp_path, "val", labels="labels.csv")
    assert (val.class_names, val.labels.tolist()) == (("owl", "wren"), [1])
    assert val.notes[-1] == "split 'val': no images of 1 of 2 classes: owl"


def test_csv_files_by_split_with_columns_and_numbers(tmp_path):
    tree(tmp_path, ["images/a.png", "images/b.png", "images/c.png"])
    columns = ["id", "species"]
    write_csv(tmp_path / "train.csv", columns, [("images/a.png", 2), ("images/b.png", 0)])
    write_csv(tmp_path / "validation.csv", columns, [("images/c.png", 1)])
    lists = {"train": "train.csv", "validation": "validation.csv"}
    options = {"labels": lists, "label_columns": columns}
    train, val = opened(tmp_path, **options), opened(tmp_path, "validation", **options)
    assert (train.class_names, train.labels.tolist()) == (("0", "1", "2"), [2, 0])  # numbers stay what they are
    assert val.labels.tolist() == [1]
    assert train.notes[-1] == "split 'train': no images of 1 of 3 classes: 1"
    assert "has no column 'filename', only id, species; set data.label_columns" in refusal(tmp_path, labels=lists)
    write_csv(tmp_path / "validation.csv", columns, [("images/c.png", 3)])
    assert "label 3 of" in refusal(tmp_path, "validation", **options)
    write_csv(tmp_path / "train.csv", columns, [("images/a.png", 2), ("images/b.png", -1)])
    assert f"label -1 of {tmp_path}/images/b.png: labels begin with 0" in refusal(tmp_path, **options)
    write_csv(tmp_path / "train.csv", columns, [("images/a.png", "")])
    assert "train.csv: no label for images/a.png" in refusal(tmp_path, **options)
    write_csv(tmp_path / "train.csv", columns, [("images/a.png", "x"), ("images/a.png", "y")])
    assert "images/a.png is there twice, as 'x' and 'y'" in refusal(tmp_path, **options)
    write_csv(tmp_path / "train.csv", columns, [("z.png", "x")])
    assert "lists none of the 3 images" in refusal(tmp_path, **options)
    assert "data.labels: nowhere.csv: no such file; searched" in refusal(tmp_path, "images", labels="nowhere.csv")


def test_a_list_for_one_split_beside_class_folders(tmp_path):
    tree(tmp_path, ["train/owl/1.png", "train/wren/1.png", "val/1.png", "val/2.png"])
    write_csv(tmp_path / "val" / "labels.csv", ["filename", "label"], [("1.png", "wren"), ("2.png", "owl")])
    lists = {"validation": "labels.csv"}
    assert opened(tmp_path, labels=lists).labels.tolist() == [0, 1]
    assert opened(tmp_path, "validation", labels=lists).labels.tolist() == [1, 0]
    assert opened(tmp_path, "validation", labels={"val": "labels.csv"}).labels.tolist() == [1, 0]
    write_csv(tmp_path / "val" / "labels.csv", ["filename", "label"], [("1.png", 1), ("2.png", 0)])
    assert opened(tmp_path, "validation", labels=lists).labels.tolist() == [1, 0]  # numbers of the same classes
    assert "data.labels: there is no split 'validaton', only 'train' and 'validation'; did you mean" in refusal(
        tmp_path, labels={"validaton": "labels.csv"}
    )


def test_folders_in_folders_are_read_by_a_key_alone(tmp_path):
    """timm takes the last folder for the class, torchvision the first."""
    tree(tmp_path / "train", ["cat/old/1.png", "cat/new/2.png", "dog/old/3.png"])
    message = refusal(tmp_path)
    assert "images lie in folders inside folders that differ (cat/new/2.png, cat/old/1.png)" in message
    assert "by the first folder there are 2 classes (cat, dog), by the last one 2 (new, old)" in message
    assert "data.class_level: first or leaf" in message
    assert classes_of(opened(tmp_path, class_level="first")) == {
        "cat/new/2.png": "cat", "cat/old/1.png": "cat", "dog/old/3.png": "dog"
    }  # fmt: skip
    leaf = opened(tmp_path, class_level="leaf")
    assert leaf.labels.tolist() == [0, 1, 1]
    assert leaf.notes == (
        "split 'train': 1 classes have images of several folders, e.g. 'old' those of cat/old, dog/old",
    )
    shutil.rmtree(tmp_path / "train")
    tree(tmp_path / "train", ["cat/1.png", "cat/more/2.png", "dog/3.png"])
    assert "images lie at several depths (cat/1.png, cat/more/2.png)" in refusal(tmp_path)


def test_stray_images_are_left_out_unless_they_are_most(tmp_path):
    tree(tmp_path / "train", ["a.png", "cat/1.png", "dog/1.png"])
    data = opened(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.notes == ("split 'train': left out: 1 images beside the class folders: a.png",)
    tree(tmp_path / "train", ["b.png", "c.png"])
    assert f"3 images lie directly in {tmp_path}/train and 2 in folders (cat, dog)" in refusal(tmp_path)


def test_hidden_and_system_files_are_no_images(tmp_path):
    train = tree(tmp_path / "train", ["cat/1.png", "dog/1.png", ".ipynb_checkpoints/1.png", "__MACOSX/cat/1.png"])
    image(train / "cat" / ".hidden.png")
    for name in (
        "cat/._1.png",
        "cat/Thumbs.db",
        "cat/.DS_Store",
        "dog/notes.txt",
        "dog/a.TXT",
        "dog/list.csv",
        "dog/README",
    ):
        (train / name).write_bytes(b"x")
    data = opened(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.images == ("cat/1.png", "dog/1.png")
    assert data.notes == ("split 'train': left out: 4 files that are no images (.txt 2, no ending 1, .csv 1)",)


def test_links_are_followed_but_not_in_circles(tmp_path):
    train = tree(tmp_path / "train", ["cat/1.png", "dog/1.png"])
    tree(tmp_path / "elsewhere", ["1.png"])
    os.symlink(tmp_path / "elsewhere", train / "owl")
    for link, target in (("cat/again", train / "cat"), ("dog/top", tmp_path), ("cat/self", "self"), ("dog/up", "..")):
        os.symlink(target, train / link)
    data = opened(tmp_path)
    assert data.images == ("cat/1.png", "dog/1.png", "owl/1.png")
    assert "split 'train': not followed: links into folders that they are in: cat/again, dog/top, dog/up" in data.notes
    os.symlink(tmp_path / "gone.png", train / "cat" / "2.png")  # an image that can't be read is a bad image, not none
    assert "cat/2.png" in opened(tmp_path).images


def test_every_format_of_pillow_is_read(tmp_path):
    endings = ["webp", "tif", "tiff", "gif", "bmp", "jfif", "PNG", "JPEG", "ppm"]
    for ending in endings:
        image(tmp_path / "train" / "a" / f"{ending}.{ending}")
    data = opened(tmp_path)
    assert len(data) == len(endings)
    assert all(np.abs(np.asarray(data[i][0]).astype(int) - 9).max() < 3 for i in range(len(data)))


def test_which_of_two_validation_splits_is_read(tmp_path):
    tree(tmp_path, ["train/a/1.png", "val/a/1.png", "validation/a/1.png", "validation/a/2.png"])
    for split, count, other in (("validation", 2, "val"), ("val", 1, "validation"), ("valid", 1, "validation")):
        data = opened(tmp_path, split)
        assert len(data) == count
        assert f"is read; data.val_split={other} reads the other" in data.notes[0]
    shutil.rmtree(tmp_path / "validation")
    assert opened(tmp_path, "validation").notes == ()


def test_empty_and_missing_folders(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "1.pdf").write_bytes(b"%PDF")
    message = refusal(tmp_path)
    assert f"split 'train': no images in {tmp_path}/train (expected {tmp_path}/train/<class>/<image>)" in message
    assert "left out: 1 file that is no image (.pdf 1)" in message
    assert "no image folder for split 'nope'" in refusal(tmp_path, "nope")
    tree(tmp_path / "train", ["a/1.png"])
    with pytest.raises(
        DataError, match=r"data.dataset_kwargs.clas_map: image folders have no such option.*'class_map'"
    ):
        open_split(folder_config(tmp_path, dataset_kwargs={"clas_map": "x"}), "train", True, 3)


def test_images_come_in_the_order_of_timms_reader(tmp_path):
    """Runs on plain class folders see the same images in the same order as before."""
    names = [
        f"{folder}/{name}.png" for folder in ("n2", "n10", "B 1", "a-1") for name in ("x10", "x9", "Y", "y_1", "01a")
    ]
    tree(tmp_path / "train", names)
    theirs, numbers = find_images_and_targets(str(tmp_path / "train"))
    data = opened(tmp_path)
    assert [(data.image_name(i), int(data.labels[i])) for i in range(len(data))] == theirs
    assert dict(zip(data.class_names, range(4), strict=True)) == numbers


def test_keys_of_image_folders_are_refused_elsewhere():
    for options in ({"labels": "x.csv"}, {"class_level": "leaf"}, {"class_map": {"a": 0}}):
        with pytest.raises(
            ConfigError, match=rf"data.{next(iter(options))}: is for image folders; the data set 'digits' has"
        ):
            open_split(DataConfig(**options), "train", True, 1)
