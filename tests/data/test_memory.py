"""Data sets held in memory: the same images as those read one by one."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.test_faults import BAD, COUNT, build, colours, damage, write_images
from tests.data.test_loaders import AUGMENTED, RESOLVED
from tests.data.test_loaders import build as build_digits
from tests.data.test_streams import write_shards
from vit_tucker.config.schema import DataConfig
from vit_tucker.data import preparation
from vit_tucker.data.batches import augmentation_seed
from vit_tucker.data.datasets import ArrayDataset, subset
from vit_tucker.data.memory import decoded_bytes, free_bytes, is_array
from vit_tucker.data.preparation import Preparation, choose_preparation, describe_preparation
from vit_tucker.data.sampler import TrainSampler
from vit_tucker.data.seeding import seed_transforms
from vit_tucker.data.splits import open_split
from vit_tucker.data.transforms import train_transform
from vit_tucker.data.vision import ConvertedDataset
from vit_tucker.errors import ConfigError, DataError

RGB = {**RESOLVED, "input_size": (3, 16, 16), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}


def digits(in_memory, **data):
    return AUGMENTED.model_copy(update={"in_memory": in_memory, **data})


@pytest.mark.parametrize("crop", [{}, {"crop_pct": 0.8}, {"crop_mode": "border", "crop_pct": 0.9}])
def test_evaluation_is_bit_equal_the_first_time_and_the_second(crop):
    resolved = {**RGB, **crop}
    one_by_one = list(build_digits(digits(False), resolved=resolved).eval)
    loaders = build_digits(digits("auto"), resolved=resolved)
    assert loaders.eval.description == "360 images in memory, transformed once"
    for _ in range(2):
        for batch, expected in zip(loaders.eval, one_by_one, strict=True):
            assert torch.equal(batch.images, expected.images)
            assert torch.equal(batch.labels, expected.labels)
    shares = [build_digits(digits("auto"), rank, 2, resolved=resolved, eval_batch_size=50).eval for rank in (0, 1)]
    assert sum(len(batch.labels) for share in shares for batch in share) == 360


def test_training_without_augmentation_is_bit_equal():
    steps = [list(build_digits(digits(x, no_aug=True), resolved=RGB).train.steps(1, 80)) for x in (True, False)]
    for (batch,), (expected,) in zip(*steps, strict=True):
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.labels, expected.labels)


def single_image(picture, key, data, resolved, seed=0):
    """timm's own transform, with generators seeded by (seed, epoch, image, repeat)."""
    seed_transforms(augmentation_seed(seed, *key))
    return train_transform(data, resolved)(picture)


@pytest.mark.parametrize("options", [{"interpolation": "random", "recount": 2}, {"aa": "rand-m9-mstd0.5-inc1"}])
def test_the_augmentation_of_an_image_is_timms_by_its_own_seed(options):
    """Of any processes, micro-batches, workers, and after a resume: each image is what timm makes of it by its key."""
    data = digits("auto", num_samples=64, **options)
    train = build_digits(data, resolved=RGB).train
    assert train.description == "64 images in memory, augmented one by one"
    dataset = subset(open_split(data, "train", True, 3), 64)
    for rank, world_size, accumulation, workers, start in ((0, 1, 1, 0, 0), (1, 2, 2, 1, 2)):
        setting = data.model_copy(update={"num_workers": workers})
        loaders = build_digits(setting, rank, world_size, resolved=RGB, grad_accum_steps=accumulation)
        sampler = TrainSampler(64, 16, 0, rank, world_size, accumulation)
        sampler.set_position(2, start)
        keys = iter(sampler)
        for step in loaders.train.steps(2, start):
            for batch in step:
                expected = [single_image(dataset[key[1]][0], key, data, RGB) for key in next(keys)]
                assert torch.equal(batch.images, torch.stack(expected))
        assert next(keys, None) is None
        loaders.close()


def test_auto_holds_arrays_and_true_holds_files(tmp_path):
    write_images(tmp_path)
    files = build(tmp_path)
    assert files.train.description.startswith("8 images read one by one: the images are files")
    kept = build(tmp_path, in_memory=True, no_aug=True)
    assert kept.train.description == "8 images in memory, transformed once"
    plain = build(tmp_path, no_aug=True)
    for (batch,), (expected,) in zip(kept.train.steps(0), plain.train.steps(0), strict=True):
        assert torch.equal(batch.images, expected.images)
    augmented, single = build(tmp_path, in_memory=True, workers=1), list(files.train.steps(0))
    assert augmented.train.description == "8 images in memory, augmented one by one by 1 worker"
    for split in ("train", "val"):
        shutil.rmtree(tmp_path / split)  # nothing is read from the files again
    for (batch,), (expected,) in zip(augmented.train.steps(0), single, strict=True):
        assert torch.equal(batch.images, expected.images)


@pytest.mark.parametrize("options", [{"no_aug": True}, {"hflip": 0.0, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}])
def test_bad_images_of_a_held_set(tmp_path, options):
    """Replaced by the next readable one in training, left out at evaluation, named; as one by one."""
    write_images(tmp_path)
    for split in ("train", "val"):
        for index in (BAD, BAD + 1):
            damage(tmp_path / split / "a" / f"{index}.png", "text")
    loaders, single = (build(tmp_path, in_memory=x, limit=4, **options) for x in (True, False))
    for (batch,), (expected,) in zip(loaders.train.steps(0), single.train.steps(0), strict=True):
        assert colours(batch.images) == colours(expected.images)
        assert len(batch.images) == 4
    for batch, expected in zip(loaders.eval, single.eval, strict=True):
        assert torch.equal(batch.images, expected.images)
        assert batch.faults == expected.faults
    assert set(loaders.faults.lines) == set(single.faults.lines)
    assert len(loaders.faults) == 4
    with pytest.raises(DataError, match=r"allows 1: .*(3|4).png of split 'train': .*; .*(3|4).png of split 'train'"):
        list(build(tmp_path, in_memory=True, limit=1, **options).train.steps(0))
    for file in (tmp_path / "train" / "a").iterdir():
        damage(file, "empty")
    with pytest.raises(DataError, match=r"^none of the 8 images of split 'train' can be read: .*png of split 'train'"):
        list(build(tmp_path, in_memory=True, limit=100, **options).train.steps(0))


def test_true_is_refused_for_streams_and_holds_images_of_any_size(tmp_path):
    write_shards(tmp_path / "wds")
    with pytest.raises(ConfigError, match=r"^data.in_memory=true: a streamed data set can't be held in memory; choose"):
        build(tmp_path / "wds", dataset="wds/", in_memory=True, batch=2)
    write_images(tmp_path / "mixed")
    Image.new("RGB", (20, 16)).save(tmp_path / "mixed" / "train" / "a" / "5.png")
    assert sum(len(batch.labels) for (batch,) in build(tmp_path / "mixed", in_memory=True).train.steps(0)) == COUNT


PHOTOS = ((61, 40, "RGB"), (24, 90, "L"), (33, 33, "RGBA"), (17, 16, "P"), (128, 20, "CMYK"), (16, 250, "RGB"))


def write_photos(root):
    """Noise of all sizes, shapes and modes, in both splits."""
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        for number, (width, height, mode) in enumerate(PHOTOS):
            picture = Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
            picture.save(root / split / "a" / f"{number}.{'jpg' if mode == 'CMYK' else 'png'}")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_what_the_log_recommends_works_for_photos_of_different_sizes(tmp_path, workers):
    options = {"workers": workers, "batch": 3, "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.5}
    files = build(write_photos(tmp_path), **options)
    assert "the images are files; data.in_memory=true would hold them in about" in files.train.description
    held = build(tmp_path, in_memory=True, **options)
    assert held.train.description.startswith("6 images in memory, augmented one by one")
    assert held.eval.description == "6 images in memory, transformed once"
    for epoch in (0, 1):
        for (batch,), (expected,) in zip(held.train.steps(epoch), files.train.steps(epoch), strict=True):
            assert torch.equal(batch.images, expected.images)
            assert torch.equal(batch.labels, expected.labels)
        for batch, expected in zip(held.eval, files.eval, strict=True):
            assert torch.equal(batch.images, expected.images)
    for loaders in (files, held):
        loaders.close()


def test_the_memory_of_held_photos_is_estimated(tmp_path, monkeypatch):
    dataset = open_split(DataConfig(dataset="folder", root=str(write_photos(tmp_path))), "train", True, 3)
    assert decoded_bytes(dataset) == sum(3 * width * height for width, height, _ in PHOTOS)  # all of them, as RGB
    (tmp_path / "train" / "a" / "5.png").write_bytes(b"")
    rest = sum(3 * width * height for width, height, _ in PHOTOS[:5])
    assert decoded_bytes(dataset) == 6 * rest // 5  # a bad one counts as the mean of the others
    large = [(Image.new("RGB", (4000, 3000)), 0)] * 50
    data, free = DataConfig(), [10 * 2**30]
    monkeypatch.setattr(preparation, "free_bytes", lambda: free[0])
    reason = choose_preparation(data, large, (3, 224, 224), training=True).reason
    assert reason == "the images are files; data.in_memory=true would hold them in about 1.7 GiB"
    wanted = data.model_copy(update={"in_memory": True})
    assert choose_preparation(wanted, large, (3, 224, 224), training=True).kind == "held"
    free[0] = 2**30
    assert (
        choose_preparation(data, large, (3, 224, 224), True).reason == "the images are files, about 1.7 GiB of pixels"
    )
    assert choose_preparation(wanted, large, (3, 224, 224), training=False).kind == "kept"  # transformed they are small
    line = r"^data.in_memory=true: 50 images are about 1.7 GiB of pixels, and 1.0 GiB are free: choose auto or false"
    with pytest.raises(ConfigError, match=line):
        choose_preparation(wanted, large, (3, 224, 224), training=True)
    free[0] = 4 * 2**30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="1.7 GiB of pixels in each of 4 processes, and 4.0 GiB are free"):
        choose_preparation(wanted, large, (3, 224, 224), training=True)


def test_free_memory_is_that_of_this_machine():
    assert 2**20 < free_bytes() < 2**50


def test_large_sets_are_not_held(monkeypatch):
    shape = (1, 8, 8)
    dataset = ArrayDataset(np.zeros((100, 4, 4), np.uint8), np.zeros(100, int), "L")
    data = DataConfig()
    monkeypatch.setattr(preparation, "LIMIT_BYTES", 100 * 64 - 1)
    assert choose_preparation(data, dataset, shape, training=True) == Preparation("array")  # which is there anyway
    assert "too many to keep in memory" in choose_preparation(data, dataset, shape, training=False).reason
    assert choose_preparation(data.model_copy(update={"in_memory": True}), dataset, shape, False).kind == "kept"
    monkeypatch.setattr(preparation, "LIMIT_BYTES", 100 * 64)
    assert choose_preparation(data, dataset, shape, training=False) == Preparation("kept")


def test_arrays_are_known_as_such():
    class Torchvision:
        def __init__(self, data):
            self.data = data

    assert is_array(subset(ArrayDataset(np.zeros((9, 4, 5), np.uint8), np.zeros(9), "L"), 3))
    for stored in (np.zeros((2, 32, 24, 3), np.uint8), torch.zeros(2, 28, 28, dtype=torch.uint8)):
        assert is_array(ConvertedDataset(Torchvision(stored), "RGB"))
    for stored in (np.zeros((2, 8, 8)), None, ["a.png"]):
        assert not is_array(ConvertedDataset(Torchvision(stored), "L"))


def test_descriptions():
    assert build_digits(digits("auto", num_workers=2)).describe() == (
        "training: 1,437 images in memory, augmented one by one by 2 workers; evaluation: 360 images in memory, transformed once"
    )
    one_by_one = describe_preparation(Preparation("image", "data.in_memory=false"), None, 1)
    assert one_by_one == "images read one by one by 1 worker: data.in_memory=false"
