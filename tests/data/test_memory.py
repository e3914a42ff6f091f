"""Data sets held in memory: the same images as one by one where nothing is random, timm's recipe in batches where it is."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing

from tests.data.test_faults import BAD, COUNT, build, colours, damage, write_images
from tests.data.test_loaders import AUGMENTED, RESOLVED, first_step
from tests.data.test_loaders import build as build_digits
from tests.data.test_streams import write_shards
from vit_tucker.config.schema import DataConfig
from vit_tucker.data import preparation
from vit_tucker.data.augmentation import Parameters
from vit_tucker.data.datasets import ArrayDataset, subset
from vit_tucker.data.memory import AugmentedBatches, HeldImages, array_size, erase
from vit_tucker.data.preparation import Preparation, batched_obstacle, choose_preparation, describe_preparation
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


def test_one_by_one_is_what_it_was():
    """The path that `false` keeps: the augmentation of the per-image transform, not that of the batches."""
    held, single = first_step(build_digits(digits("auto")))[0], first_step(build_digits(digits(False)))[0]
    assert torch.equal(held.labels, single.labels)
    assert not torch.equal(held.images, single.images)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_from_image_and_epoch_only(workers):
    alone = digits(True, hflip=0.5, interpolation="random", recount=2, num_samples=64)
    data = alone.model_copy(update={"num_workers": workers})
    whole = list(build_digits(data).train.steps(2, 1))
    resumed = list(build_digits(alone).train.steps(2, 3))
    for (batch,), (again,) in zip(whole[2:], resumed, strict=True):
        assert torch.equal(batch.images, again.images)
    parts = [list(build_digits(data, rank, 2, grad_accum_steps=2).train.steps(2, 1)) for rank in (0, 1)]
    for number, (batch,) in enumerate(whole):
        united = torch.cat([micro.images for rank in parts for micro in rank[number]])
        assert {x.numpy().tobytes() for x in united} == {x.numpy().tobytes() for x in batch.images}
    for other in (build_digits(alone, seed=1).train.steps(2, 3), build_digits(alone).train.steps(3, 3)):
        assert not torch.equal(next(iter(other))[0].images, resumed[0][0].images)


def held(count=6, height=20, width=24, channels=3):
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, channels, width), dtype=np.uint8)
    return HeldImages(torch.from_numpy(pixels), torch.arange(count), {})


def test_the_whole_transform_is_timms_with_the_same_parameters():
    """Crops of each interpolation, both flips and the normalisation in one."""
    images, size = held(), (16, 16)
    data = DataConfig(reprob=0.0)
    batches = AugmentedBatches(images, data, RGB, 0)
    rng = np.random.default_rng(1)
    h, w = rng.integers(4, 20, 6), rng.integers(4, 24, 6)
    boxes = np.stack([rng.integers(0, 20 - h + 1), rng.integers(0, 24 - w + 1), h, w], axis=1)
    flags = np.array([[0, 0, 1, 1, 0, 1], [0, 1, 0, 1, 1, 0], [1, 0, 0, 1, 0, 1]], dtype=bool)
    ours = batches.transform(images.pixels, Parameters(boxes, *flags, [[]] * 6, np.zeros(6)))
    for i in range(6):
        picture = Image.fromarray(images.pixels[i].numpy().transpose(0, 2, 1).copy())
        top, left, height, width = boxes[i].tolist()
        mode = Image.BICUBIC if flags[0, i] else Image.BILINEAR
        picture = picture.crop((left, top, left + width, top + height)).resize((16, height), mode).resize(size, mode)
        picture = picture.transpose(Image.FLIP_LEFT_RIGHT) if flags[1, i] else picture
        picture = picture.transpose(Image.FLIP_TOP_BOTTOM) if flags[2, i] else picture
        tail = train_transform(DataConfig(no_aug=True), RGB)  # of an image of that size only the normalisation is left
        scaled = (ours[i] - tail(picture)) * torch.tensor(RGB["std"]).view(3, 1, 1) * 255
        assert scaled.abs().max() < 2.01  # see test_resample.assert_rounding_only
        assert (scaled.abs() > 0.01).float().mean() < 0.05


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_fills_its_boxes_as_timm_does(mode):
    image = torch.full((3, 64, 64), 7.0)
    erase(image, [(2, 3, 40, 50), (60, 60, 4, 4)], mode, 5)
    inside = torch.zeros(64, 64, dtype=torch.bool)
    inside[2:42, 3:53] = inside[60:, 60:] = True
    assert torch.equal(image[:, ~inside], torch.full((3, int((~inside).sum())), 7.0))
    box, theirs = image[:, 2:42, 3:53], torch.full((3, 64, 64), 7.0)
    RandomErasing(1.0, mode=mode, device="cpu")(theirs)
    erased = theirs[0] != 7
    # how many values a channel's box holds: one zero, one colour, or noise in each pixel; timm's and ours
    for values in (box, theirs[:, erased]):
        distinct = [len(channel.unique()) for channel in values]
        assert all(n == 1 for n in distinct) if mode != "pixel" else all(n > 100 for n in distinct)
        assert (values.unique().numel() == 1) == (mode == "const")
    if mode == "pixel":  # standard normal: 6,000 values, 5 standard errors
        assert abs(box.mean()) < 5 / 6000**0.5
        assert abs(box.std() - 1) < 5 / (2 * 6000) ** 0.5
    again = torch.full((3, 64, 64), 7.0)
    erase(again, [(2, 3, 40, 50), (60, 60, 4, 4)], mode, 5)
    assert torch.equal(again, image)
    erase(again, [(2, 3, 40, 50)], mode, 6)
    assert torch.equal(again, image) == (mode == "const")


def test_auto_holds_arrays_and_true_holds_files(tmp_path):
    write_images(tmp_path)
    files = build(tmp_path)
    assert files.train.description.startswith("8 images read one by one: the images are files")
    kept = build(tmp_path, in_memory=True, no_aug=True)
    assert kept.train.description == "8 images in memory, transformed once"
    plain = build(tmp_path, no_aug=True)
    for (batch,), (expected,) in zip(kept.train.steps(0), plain.train.steps(0), strict=True):
        assert torch.equal(batch.images, expected.images)
    augmented = build(tmp_path, in_memory=True, workers=1)
    assert augmented.train.description == "8 images in memory, augmented in batches by 1 worker"
    assert sorted(colours(torch.cat([b.images for (b,) in augmented.train.steps(0)]))) == list(range(COUNT))


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


REFUSED = [
    ({"aa": "3a"}, "data.aa needs single PIL images"),
    ({"color_jitter": 0.4}, "data.color_jitter needs"),
    ({"train_crop_mode": "rkrc"}, "data.train_crop_mode=rkrc needs"),
    ({"interpolation": "lanczos"}, "data.interpolation=lanczos needs"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_needs_single_images_is_read_one_by_one_or_refused(options, message):
    data = digits("auto", **options)
    loaders = build_digits(data)
    assert loaders.train.description == f"1,437 images read one by one: {message.partition(' ')[0]} needs PIL"
    assert first_step(loaders)[0].images.shape == (16, 1, 8, 8)
    with pytest.raises(ConfigError, match=rf"^data.in_memory=true: {message}") as caught:
        build_digits(data.model_copy(update={"in_memory": True}))
    assert "\n" not in str(caught.value)
    fixed = data.model_copy(update={"no_aug": True})  # which asks for none of these
    assert batched_obstacle(fixed) is None


def test_true_is_refused_for_streams_and_for_mixed_sizes(tmp_path):
    write_shards(tmp_path / "wds")
    with pytest.raises(ConfigError, match=r"^data.in_memory=true: a streamed data set can't be held in memory; choose"):
        build(tmp_path / "wds", dataset="wds/", in_memory=True, batch=2)
    write_images(tmp_path / "mixed")
    Image.new("RGB", (20, 16)).save(tmp_path / "mixed" / "train" / "a" / "5.png")
    with pytest.raises(
        ConfigError,
        match=r"must be of one size, but .*/5.png of split 'train' is 20x16 pixels, the first one 16x16; choose",
    ):
        build(tmp_path / "mixed", in_memory=True)
    build(tmp_path / "mixed", in_memory="auto")


def test_large_sets_are_not_held(monkeypatch):
    shape = (1, 8, 8)
    dataset = ArrayDataset(np.zeros((100, 4, 4), np.uint8), np.zeros(100, int), "L")
    data = DataConfig()
    monkeypatch.setattr(preparation, "LIMIT_BYTES", 100 * 16)
    assert choose_preparation(data, dataset, shape, training=True) == Preparation("augmented")
    assert choose_preparation(data, dataset, shape, training=False).kind == "image"  # 8x8 of each is what would be kept
    monkeypatch.setattr(preparation, "LIMIT_BYTES", 100 * 64)
    assert choose_preparation(data, dataset, shape, training=False) == Preparation("kept")
    monkeypatch.setattr(preparation, "LIMIT_BYTES", 100 * 16 - 1)
    assert "too many to hold" in choose_preparation(data, dataset, shape, training=True).reason
    assert choose_preparation(data.model_copy(update={"in_memory": True}), dataset, shape, True) == Preparation(
        "augmented"
    )


def test_arrays_are_known_as_such():
    class Torchvision:
        def __init__(self, data):
            self.data = data

    assert array_size(subset(ArrayDataset(np.zeros((9, 4, 5), np.uint8), np.zeros(9), "L"), 3)) == (4, 5)
    for stored, size in (
        (np.zeros((2, 32, 24, 3), np.uint8), (32, 24)),
        (np.zeros((2, 3, 32, 24), np.uint8), (32, 24)),
    ):
        assert array_size(ConvertedDataset(Torchvision(stored), "RGB")) == size
    assert array_size(ConvertedDataset(Torchvision(torch.zeros(2, 28, 28, dtype=torch.uint8)), "L")) == (28, 28)
    for stored in (np.zeros((2, 8, 8)), None, ["a.png"]):
        assert array_size(ConvertedDataset(Torchvision(stored), "L")) is None


def test_descriptions():
    assert build_digits(digits("auto", num_workers=2)).describe() == (
        "training: 1,437 images in memory, augmented in batches by 2 workers; evaluation: 360 images in memory, transformed once"
    )
    one_by_one = describe_preparation(Preparation("image", "data.aa needs PIL"), None, 1)
    assert one_by_one == "images read one by one by 1 worker: data.aa needs PIL"
