"""Cropping and resizing in batches against Pillow; random parameters against timm's own draws."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from vit_tucker.config.schema import DataConfig
from vit_tucker.data import resample
from vit_tucker.data.augmentation import central_box, crop_boxes, draw_parameters, erased_boxes
from vit_tucker.data.philox import philox, uniforms

MODES = {False: InterpolationMode.BILINEAR, True: InterpolationMode.BICUBIC}
SIZES = [((8, 8), (16, 16)), ((28, 28), (28, 28)), ((32, 32), (48, 40)), ((32, 24), (9, 11)), ((40, 40), (8, 32))]


def stored(count, height, width, channels, seed=0):
    """Noise, which shows every weight, beside a smooth image, in the layout of held images: (n, height, channels, width)."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, height, channels, width), dtype=np.uint8)
    pixels[0] = np.linspace(0, 255, width).astype(np.uint8)
    return torch.from_numpy(pixels)


def some_boxes(count, height, width, seed=1):
    rng = np.random.default_rng(seed)
    h, w = rng.integers(1, height + 1, count), rng.integers(1, width + 1, count)
    boxes = np.stack([rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w], axis=1)
    boxes[0] = 0, 0, height, width
    return boxes


def crop_resize(*arguments):
    """All images at once, (B, channels, *size)."""
    return torch.cat([values for _, _, values in resample.crop_resize(*arguments)])


def pillow(image, box, size, cubic, hflip, vflip, passes=True):
    """What timm's transform does to one image, (height, channels, width) -> (channels, height, width) uint8.

    With ``passes`` the horizontal pass comes first in any version of Pillow.
    """
    array = image.numpy().transpose(0, 2, 1)
    picture = Image.fromarray(np.ascontiguousarray(array.squeeze(2) if array.shape[2] == 1 else array))
    if passes:
        between = tvf.resized_crop(picture, *box.tolist(), (int(box[2]), size[1]), MODES[cubic])
        result = tvf.resize(between, size, MODES[cubic])
    else:
        result = tvf.resized_crop(picture, *box.tolist(), size, MODES[cubic])
    result = tvf.hflip(result) if hflip else result
    return tvf.pil_to_tensor(tvf.vflip(result) if vflip else result)


def assert_rounding_only(ours, theirs):
    """At most a few pixels differ by 1 of 255, hardly any by 2, none by more.

    Both round to 8 bits after each pass. Our weights have 15 bits, Pillow's 22: a sum may come to lie on the other side of a
    half, which moves one pass by 1, and the other pass (whose absolute weights sum to at most 1.3) may add 1. Exact halves are
    common where the weights are fractions like 1/56, hence per cents and not per milles.
    """
    difference = (ours - theirs).abs()
    assert difference.max() <= 2
    assert (difference > 0).float().mean() < 0.05
    assert (difference > 1).float().mean() < 0.001


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize(("full", "size"), SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_are_pillows(full, size, channels, cubic):
    count = 12
    pixels, boxes = stored(count, *full, channels), some_boxes(count, *full)
    flips = np.arange(count) % 2 == 0, np.arange(count) % 3 == 0
    ours = crop_resize(pixels, boxes, size, *flips, cubic)
    theirs = torch.stack(
        [pillow(pixels[i], boxes[i], size, cubic, flips[0][i], flips[1][i]) for i in range(count)]
    ).float()
    assert_rounding_only(ours, theirs)
    # the twin that must fail: a box that is one pixel off, or no flip
    if full != size:
        moved = boxes.copy()
        moved[:, 2] = np.maximum(boxes[:, 2] - 1, 1)
        assert (crop_resize(pixels, moved, size, *flips, cubic) - theirs).abs().max() > 20
    assert (crop_resize(pixels, boxes, size, ~flips[0], flips[1], cubic) - theirs).abs().max() > 20


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize(("full", "size"), SIZES)
def test_smooth_images_do_not_show_the_order_of_the_passes(full, size, cubic):
    """timm's own call: it differs from the above where noise overshoots and is clipped, not on what looks like a picture."""
    count, (height, width) = 12, full
    y, x = np.arange(height)[:, None, None] / height, np.arange(width)[None, None] / width
    down, across, phase = np.random.default_rng(0).uniform(-1, 1, (3, count, 1, 3, 1))
    waves = 128 + 80 * np.sin(2 * np.pi * (down * y + across * x + phase))  # (count, height, 3, width)
    pixels = torch.from_numpy(np.rint(waves).astype(np.uint8))
    boxes, none = some_boxes(count, height, width), np.zeros(count, dtype=bool)
    ours = crop_resize(pixels, boxes, size, none, none, cubic)
    calls = [pillow(pixels[i], boxes[i], size, cubic, False, False, passes=False) for i in range(count)]
    assert_rounding_only(ours, torch.stack(calls).float())


def test_shrinking_is_antialiased():
    """A fine checkerboard becomes grey; sampling single pixels would keep its black and white."""
    board = torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8).repeat(16, 16).view(1, 32, 1, 32)
    none = np.zeros(1, dtype=bool)
    small = crop_resize(board, np.array([[0, 0, 32, 32]]), (8, 8), none, none, False)
    assert (small - 127.5).abs().max() <= 1  # rounding of two passes


@pytest.mark.parametrize("cubic", [False, True])
def test_an_image_is_the_same_in_any_batch(cubic):
    pixels, boxes = stored(9, 32, 32, 3), some_boxes(9, 32, 32)
    flips = np.arange(9) % 2 == 0
    whole = crop_resize(pixels, boxes, (24, 50), flips, flips, cubic)
    for part in ([4], [8, 4, 0], [4, 5, 6, 7, 8]):
        alone = crop_resize(pixels[part], boxes[part], (24, 50), flips[part], flips[part], cubic)
        assert torch.equal(alone, whole[part])


KNOWN = [  # counter, key, result: known-answer tests of Random123 (philox4x32-10)
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_numbers(counter, key, words):
    assert philox(np.array(counter), key).tolist() == list(words)
    many = philox(np.array([[counter, (1, 2, 3, 4)]]), key)
    assert many.shape == (1, 2, 4)
    assert many[0, 0].tolist() == list(words)


def test_uniforms_stay_inside():
    assert uniforms(np.array([0], dtype=np.uint64))[0] > 0
    assert uniforms(np.array([2**32 - 1], dtype=np.uint64))[0] < 1


def keys(count, epoch=0, repeat=0):
    return [(epoch, index, repeat) for index in range(count)]


def same_distribution(a, b):
    """Two samples agree by Kolmogorov and Smirnov at about one false alarm in 10,000: c = sqrt(ln(2 / 1e-4) / 2) = 2.23."""
    a, b = np.sort(a), np.sort(b)
    grid = np.concatenate([a, b])
    gap = np.abs(np.searchsorted(a, grid, "right") / len(a) - np.searchsorted(b, grid, "right") / len(b)).max()
    return gap < 2.23 * np.sqrt(1 / len(a) + 1 / len(b))


COUNT = 4000
RANGES = [
    ((0.08, 1.0), (3 / 4, 4 / 3), (32, 32)),
    ((0.75, 1.0), (0.85, 1.18), (8, 8)),
    ((0.2, 0.6), (0.5, 0.8), (20, 40)),
]


@pytest.mark.parametrize(("scale", "ratio", "size"), RANGES)
def test_crop_boxes_are_distributed_as_timms(scale, ratio, size):
    random.seed(0)
    image = Image.new("L", size[::-1])
    theirs = np.array([RandomResizedCropAndInterpolation.get_params(image, scale, ratio) for _ in range(COUNT)])
    numbers = np.random.default_rng(0).random((COUNT, 10, 4))
    ours = crop_boxes(numbers, scale, ratio, size)
    for column in range(4):
        assert same_distribution(ours[:, column], theirs[:, column])
    areas, wrong = ours[:, 2] * ours[:, 3], crop_boxes(numbers, (scale[0] * 0.8, scale[1] * 0.8), ratio, size)
    assert same_distribution(areas, theirs[:, 2] * theirs[:, 3])
    assert not same_distribution(wrong[:, 2] * wrong[:, 3], theirs[:, 2] * theirs[:, 3])


@pytest.mark.parametrize("size", [(10, 100), (100, 10), (30, 30)])
def test_the_fallback_is_timms_central_crop(size):
    impossible = ((2.0, 2.0), (3 / 4, 4 / 3))
    theirs = RandomResizedCropAndInterpolation.get_params(Image.new("L", size[::-1]), *impossible)
    assert central_box(impossible[1], size) == theirs
    assert tuple(crop_boxes(np.full((1, 10, 4), 0.5), *impossible, size)[0]) == theirs


@pytest.mark.parametrize("recount", [1, 3])
def test_erased_boxes_are_distributed_as_timms(recount):
    """Read off timm's own result: how many pixels it sets to zero."""
    random.seed(0)
    erasing = RandomErasing(1.0, mode="const", max_count=recount, device="cpu")
    theirs = np.array([(erasing(torch.ones(1, 24, 32)) == 0).sum() for _ in range(COUNT)])
    rng, ours = np.random.default_rng(0), []
    for _ in range(COUNT):
        mask = np.zeros((24, 32), dtype=bool)
        for top, left, h, w in erased_boxes(rng.random(), rng.random((recount * 10, 4)), recount, (24, 32)):
            assert top + h <= 24
            assert left + w <= 32
            mask[top : top + h, left : left + w] = True
        ours.append(mask.sum())
    assert same_distribution(np.array(ours), theirs)
    assert not same_distribution(np.array(ours) * 1.2, theirs)


def test_probabilities_are_the_configs():
    data = DataConfig(hflip=0.3, vflip=0.1, reprob=0.25)
    drawn = draw_parameters(keys(COUNT), (1, 2), data, (32, 32), (32, 32))
    erased = np.array([bool(boxes) for boxes in drawn.erased])
    for flags, p in ((drawn.hflip, 0.3), (drawn.vflip, 0.1), (drawn.bicubic, 0.5), (erased, 0.25)):
        assert abs(flags.mean() - p) < 4 * np.sqrt(p * (1 - p) / COUNT)  # 4 standard deviations
    assert abs(np.corrcoef(drawn.hflip, erased)[0, 1]) < 4 / np.sqrt(COUNT)
    assert len(set(drawn.noise.tolist())) == COUNT
    assert drawn.noise.max() < 2**63  # what torch takes as a seed
    for interpolation, expected in (("bilinear", False), ("bicubic", True)):
        fixed = draw_parameters(keys(9), (1, 2), DataConfig(interpolation=interpolation), (8, 8), (8, 8))
        assert set(fixed.bicubic.tolist()) == {expected}


def test_parameters_follow_from_seed_epoch_image_and_repeat():
    data = DataConfig(hflip=0.5, reprob=0.5, recount=2)

    def draw(chosen, key=(1, 2)):
        return draw_parameters(chosen, key, data, (32, 32), (32, 32))

    whole, part = draw(keys(40)), draw(keys(40)[7:9])
    assert np.array_equal(whole.boxes[7:9], part.boxes)
    assert whole.erased[7:9] == part.erased
    for other in (draw(keys(40, epoch=1)), draw(keys(40, repeat=1)), draw(keys(40), (1, 3))):
        assert (other.boxes != whole.boxes).any(1).mean() > 0.9
