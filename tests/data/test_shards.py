"""webdataset: where images, labels and shards are, and how labels become classes."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from tests.data.test_datasets import write_shards
from tests.data.test_streams import build
from vit_tucker.config.schema import DataConfig
from vit_tucker.data.labels import class_names
from vit_tucker.data.samples import calibration_images, evaluation_images
from vit_tucker.data.splits import open_split
from vit_tucker.errors import DataError

RESOLVED = {"input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3}
RESOLVED |= {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}


def encoded(number, kind="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(file, kind)
    return file.getvalue()


def write_tar(file, samples, first=0):
    """A shard; each sample is a dict of endings and contents."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for number, sample in enumerate(samples, first):
            for ending, content in sample.items():
                data = content if isinstance(content, bytes) else str(content).encode()
                member = tarfile.TarInfo(f"{number:04d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write(root, samples, split="train", info=True, **more):
    """One shard of a split; an _info.json that lists it and what is there already."""
    write_tar(root / f"{split}-0000.tar", samples)
    file = root / "_info.json"
    if info:
        content = json.loads(file.read_text()) if file.is_file() else {"splits": {}}
        entry = {"name": split, "num_samples": len(samples)}
        content["splits"][split] = {**entry, "filenames": [f"{split}-0000.tar"], "shard_lengths": [len(samples)]}
        file.write_text(json.dumps(content | more))
    return root


def opened(root, split="train", classes=None, num_classes=None, **data):
    config = DataConfig(dataset="wds/", root=str(root), **data)
    return open_split(config, split, False, 3, classes=classes, num_classes=num_classes)


def labels_of(stream):
    return [label for _, label in stream]


def test_keys_that_are_not_there_are_one_line_that_says_what_to_set(tmp_path):
    meta = json.dumps({"width": 8, "label": 1, "caption": "a"})
    root = write(tmp_path, [{"jpeg": encoded(0), "json": meta}] * 2)
    with pytest.raises(DataError) as caught:
        opened(root)
    assert str(caught.value) == (
        f"wds/, split 'train': the first sample (0000 in {root}/train-0000.tar) has the keys jpeg, json (fields of the json: "
        "width, label, caption), but no label 'cls'; set data.dataset_kwargs={target_key: label}"
    )
    assert labels_of(opened(root, dataset_kwargs={"target_key": "label"})) == [1, 1]  # .jpeg needs no key
    with pytest.raises(
        DataError, match=r"but no image 'jpg;png' and no label 'cls'; set .*\{input_key: jpeg, target_key: label\}$"
    ):
        opened(root, dataset_kwargs={"input_key": "jpg;png"})
    with pytest.raises(
        DataError, match=r"has the keys jpeg, txt, but no label 'cls'; set data.dataset_kwargs=\{target_key: txt\}$"
    ):
        opened(write(tmp_path / "text", [{"jpeg": encoded(0), "txt": 3}]))
    assert labels_of(opened(tmp_path / "text", dataset_kwargs={"target_key": "txt"})) == [3]
    with pytest.raises(
        DataError, match=r"has the keys jpeg, cls, but no label 'class'; leave out target_key of data.dataset_kwargs$"
    ):
        opened(write(tmp_path / "cls", [{"jpeg": encoded(0), "cls": 3}]), dataset_kwargs={"target_key": "class"})
    with pytest.raises(DataError, match=r"has the keys npy, cls, but no image$"):
        opened(write(tmp_path / "npy", [{"npy": b"x", "cls": 3}]))
    with pytest.raises(
        DataError, match=r"has the keys png, jpg, cls, but several images, png, jpg; set .*=\{input_key: png\}$"
    ):
        opened(write(tmp_path / "two", [{"png": encoded(0, "PNG"), "jpg": encoded(1), "cls": 3}]))


def test_wrong_keys_stop_training_evaluation_and_calibration(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path, [{"jpeg": encoded(0), "json": '{"label": 0}'}] * 4, split)
    data = DataConfig(dataset="wds/", root=str(tmp_path))
    for start in (
        lambda: build(tmp_path),  # of train, --dry-run and evaluate
        lambda: next(calibration_images(data, RESOLVED, 2, 2, 0)),
        lambda: next(evaluation_images(data, RESOLVED, 2, 2)),
    ):
        with pytest.raises(DataError, match=r"^wds/, split .*set data.dataset_kwargs=\{target_key: label\}$"):
            start()


@pytest.mark.parametrize(
    ("ending", "kind"),
    [("jpeg", "JPEG"), ("JPG", "JPEG"), ("webp", "WEBP"), ("bmp", "BMP"), ("tif", "TIFF"), ("TIFF", "TIFF")],
)
def test_image_formats_need_no_key(tmp_path, ending, kind):
    root = write(tmp_path, [{ending: encoded(3, kind), "cls": 1, "seg.png": encoded(9, "PNG")}])
    ((image, label),) = opened(root)
    assert (image.mode, label) == ("RGB", 1)
    assert abs(image.getpixel((0, 0))[0] - 60) < 4


def test_names_as_labels_go_by_a_class_map_or_the_info_file(tmp_path):
    samples = [{"jpeg": encoded(i), "cls": name} for i, name in enumerate(("dog", "cat", "dog"))]
    root = write(tmp_path / "bare", samples)
    with pytest.raises(
        DataError, match=r"0000 in .*train-0000.tar has the label 'dog', a name without a number; set data.class_map"
    ):
        opened(root)
    (root / "map.json").write_text('{"dog": 0, "cat": 1}')
    for given in ({"class_map": "map.json"}, {"dataset_kwargs": {"class_map": {"dog": 0, "cat": 1}}}):
        assert labels_of(opened(root, **given)) == [0, 1, 0]
    with pytest.raises(DataError, match="0001 in .* has the label 'cat', which data.class_map lacks"):
        labels_of(opened(root, class_map={"dog": 0}))
    named = write(tmp_path / "named", samples, class_names=["cat", "dog"])
    assert labels_of(opened(named)) == [1, 0, 1]
    assert class_names(opened(named)) == ("cat", "dog")
    # the run's classes go before those of this file, for names and for numbers
    numbers = write(tmp_path / "numbers", [{"jpeg": encoded(0), "cls": 0}], class_names=["cat", "dog"])
    for folder, expected in ((named, [1, 2, 1]), (numbers, [2])):
        assert labels_of(opened(folder, classes=["emu", "dog", "cat"])) == expected
    with pytest.raises(DataError, match="is of class 'cat', which is none of the 1 classes of the training split"):
        labels_of(opened(named, classes=["dog"]))


@pytest.mark.parametrize("label", [2, -1])
def test_labels_beyond_the_classes_end_the_stream_in_one_line(tmp_path, label):
    good = {"jpeg": encoded(1), "cls": 1}
    for split in ("train", "validation"):
        write(tmp_path, [good, good, {"jpeg": encoded(2), "cls": label}, good], split)
    loaders = build(tmp_path, limit=9, num_classes=2)
    reason = ", but there are 2 classes, 0 to 1" if label > 0 else ": labels begin with 0"
    for batches, split in ((loaders.train.steps(0), "train"), (loaders.eval, "validation")):
        with pytest.raises(
            DataError,
            match=rf"^split '{split}': label {label} of 0002 in {tmp_path}/{split}-0000.tar \(wds/\){reason}",
        ):
            list(batches)
    write(tmp_path, [{"jpeg": encoded(2), "cls": label}], "validation")
    with pytest.raises(DataError, match=f"label {label} of 0000 in .*validation-0000.tar"):
        build(tmp_path, limit=9, num_classes=2)  # of the first sample already when it is opened


def test_a_sample_without_a_label_is_a_bad_one(tmp_path):
    good = {"jpeg": encoded(1), "cls": 1}
    write(tmp_path, [good] * 4)
    write(tmp_path, [good, {"jpeg": encoded(2)}, {"cls": 1}, good], "validation")
    loaders = build(tmp_path, limit=2)
    assert sum(len(batch.labels) for batch in loaders.eval) == 2
    assert [line.rpartition(": ")[2] for line in loaders.faults.lines] == ["no label 'cls'", "no image"]


def test_splits_without_an_info_file_are_patterns(tmp_path):
    for number in range(3):
        samples = [{"jpeg": encoded(i), "cls": i % 2} for i in range(number, number + 2)]
        write_tar(tmp_path / f"train-{number:04d}.tar", samples, first=10 * number)
    splits = {"train_split": "train-{0000..0001}.tar|4", "val_split": "train-0002.tar"}  # an evaluation needs no number
    loaders = build(tmp_path, **splits)
    assert (loaders.train.num_samples, loaders.train.steps_per_epoch) == (4, 1)
    ((batch,),) = list(loaders.train.steps(0))
    assert sorted(batch.labels.tolist()) == [0, 0, 1, 1]
    assert [label for batch in loaders.eval for label in batch.labels.tolist()] == [0, 1]
    with pytest.raises(
        DataError,
        match=r"^the stream of split 'train-\{0000..0001\}.tar' does not state its number of images.*num_samples: ",
    ):
        build(tmp_path, **{**splits, "train_split": "train-{0000..0001}.tar"})
    with pytest.raises(
        DataError,
        match=r"no _info.json in .*'train-\{0000..0003\}.tar\|5000'; there are train-0000.tar, train-0001.tar, ",
    ):
        build(tmp_path)
    with pytest.raises(
        DataError, match=r"none of its 2 shards \(.*val-0.tar, ...\) has a sample that can be read: FileNotFoundError"
    ):
        build(tmp_path, val_split="val-{0..1}.tar", train_split=splits["train_split"])
    with pytest.raises(DataError, match=r"expected a number of samples after '\|', found 'many'"):
        build(tmp_path, train_split="train-{0000..0001}.tar|many")


def test_splits_go_by_their_exact_names(tmp_path):
    write(tmp_path, [{"jpeg": encoded(1), "cls": 0}])
    write(tmp_path, [{"jpeg": encoded(1), "cls": 1}], "val")
    with pytest.raises(DataError, match=r"has no split 'validation', there are: train, val; did you mean 'val'\?$"):
        opened(tmp_path, "validation")
    write(tmp_path, [{"jpeg": encoded(1), "cls": 0}], "validation")
    assert (labels_of(opened(tmp_path, "val")), labels_of(opened(tmp_path, "validation"))) == ([1], [0])
    (tmp_path / "_info.json").write_text("{")
    with pytest.raises(DataError, match="_info.json: can't be read: Expecting property name"):
        opened(tmp_path)


def seen(loaders, epoch=0, start=0):
    """Red channels / 20, as write_shards numbers its samples."""
    steps = list(loaders.train.steps(epoch, start))
    return [(batch.images[:, 0, 0, 0] * 255 / 20).round().int().tolist() for step in steps for batch in step]


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (2, 1), (1, 2), (2, 2)])
def test_num_samples_of_a_stream_are_its_first_ones(tmp_path, workers, world_size):
    write_shards(tmp_path, sizes=(3, 3, 3, 3))
    options = {"num_samples": 8, "no_aug": True, "reprob": 0.0}

    def fresh(rank=0, **more):
        return build(tmp_path, workers, rank, world_size, **{**options, **more})

    loaders = [fresh(rank) for rank in range(world_size)]
    assert {(each.train.num_samples, each.train.steps_per_epoch) for each in loaders} == {(8, 2)}
    epochs = [[seen(each, epoch) for each in loaders] for epoch in (0, 1)]
    for epoch in epochs:
        numbers = [number for process in epoch for batch in process for number in batch]
        assert sorted(numbers) == list(range(8))  # each exactly once, in all steps of all processes
    assert epochs[0] != epochs[1]
    assert [seen(fresh(rank), 1, 1) for rank in range(world_size)] == [process[1:] for process in epochs[1]]
    for each in loaders:
        each.close()


def test_num_samples_beyond_the_stream_are_refused(tmp_path):
    write_shards(tmp_path, sizes=(3, 3))
    with pytest.raises(DataError, match="data.num_samples=7: the training split has 6 images"):
        build(tmp_path, num_samples=7)
    loaders = build(tmp_path, num_samples=7, batch=7, dataset_kwargs={"num_samples": 9})
    with pytest.raises(DataError, match="data.num_samples=7: the stream of split 'train' has 6 samples"):
        list(loaders.train.steps(0))
    few = build(tmp_path, workers=2, num_samples=1, batch=1, no_aug=True, reprob=0.0)  # fewer than workers
    assert seen(few) == [[0]]
    few.close()
    data = DataConfig(dataset="wds/", root=str(tmp_path), num_samples=2)
    (images,) = calibration_images(data, RESOLVED, 5, 5, 0)
    assert (images[:, 0, 0, 0] * 255 / 20).round().tolist() == [0, 1]


def test_a_worker_without_a_shard_is_not_left_out_silently(tmp_path):
    write_shards(tmp_path, sizes=(8,))
    loaders = build(tmp_path, workers=2)
    with pytest.raises(
        DataError,
        match="^the stream of split 'train' has no images for this process or loader worker; lower data.num_workers",
    ):
        list(loaders.train.steps(0))


def test_sixteen_bit_images_of_a_stream_are_scaled(tmp_path):
    file = io.BytesIO()
    Image.fromarray(torch.full((4, 4), 32768, dtype=torch.int32).numpy().astype("uint16")).save(file, "PNG")
    ((image, _),) = opened(write(tmp_path, [{"png": file.getvalue(), "cls": 0}]))
    assert image.getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    "root",
    ["pipe:touch {0}; cat /dev/null #", "https://x/'; touch {0}; '", "https://x/$(touch {0})", "hf:x/`touch {0}`"],
)
@pytest.mark.parametrize("listed", [True, False])
def test_no_shard_is_a_command(tmp_path, monkeypatch, root, listed):
    """webdataset runs what follows "pipe:", and some versions hand addresses to a shell: a data set's or config's are refused."""
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "marker"
    root = root.format(marker)
    if listed:  # by the data set itself
        (tmp_path / "_info.json").write_text(
            json.dumps({"splits": {"a": {"filenames": [f"{root}.tar"], "num_samples": 1}}})
        )
        config = DataConfig(dataset="wds/x", root="", val_split="a", train_split="a")
        with pytest.raises(DataError):
            open_split(config, "a", False, 3)
    else:
        config = DataConfig(dataset="wds/x", root=root, val_split="a.tar|5", train_split="a.tar|5")
        with pytest.raises(
            DataError, match="no shard: a path or plain address is needed, and no command is run"
        ) as caught:
            open_split(config, "a.tar|5", False, 3)
        assert "\n" not in str(caught.value)
    assert not marker.exists()
