"""The picture of predictions: pixels, colours and texts of what it shows."""

import time

import pytest
import torch

from vit_tucker.training.pictures import RIGHT, WRONG, denormalise, prediction_figure

pytestmark = pytest.mark.slow

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(picture, colour):
    """How many pixels have exactly this colour ('#rrggbb')."""
    wanted = torch.tensor([int(colour[i : i + 2], 16) for i in (1, 3, 5)], dtype=torch.uint8)
    return int((picture == wanted.view(3, 1, 1)).all(0).sum())


def flat_images(count, size=28, level=(0.2, 0.6, 0.4)):
    """Normalised images of one colour, (count, 3, size, size)."""
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    return ((torch.tensor(level).view(1, 3, 1, 1) - mean) / std).expand(count, -1, size, size)


def logits_for(predicted, classes=10):
    return 5.0 * torch.nn.functional.one_hot(torch.tensor(predicted), classes)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_back_as_they_were(channels):
    original = torch.randint(0, 256, (2, channels, 5, 7), generator=torch.Generator().manual_seed(0))
    mean, std = MEAN[:channels], STD[:channels]
    shift, scale = (torch.tensor(x).view(1, -1, 1, 1) for x in (mean, std))
    back = torch.from_numpy(denormalise((original / 255 - shift) / scale, mean, std)).permute(0, 3, 1, 2)
    assert torch.equal(back.long(), original.expand(-1, 3, -1, -1))
    other = torch.from_numpy(denormalise((original / 255 - shift) / scale, mean, [2 * s for s in std]))
    assert not torch.equal(other.permute(0, 3, 1, 2).long(), original.expand(-1, 3, -1, -1))


def test_values_outside_the_range_are_cut_not_wrapped():
    shown = denormalise(torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1), (0.5,), (0.2,))
    assert shown[0].max() == 0
    assert shown[1].min() == 255


@pytest.mark.parametrize("size", [28, 224])
def test_each_image_is_shown_large(size):
    picture = prediction_figure(flat_images(6, size), torch.arange(6), logits_for(range(6)), MEAN, STD)
    assert picture.dtype == torch.uint8
    assert picture.shape[0] == 3
    shown = pixels(picture, "#339966")  # (0.2, 0.6, 0.4) * 255
    assert shown > 6 * 150**2  # six squares of at least 150 pixels
    assert pixels(picture, "#336699") == 0


def test_wrong_predictions_are_marked():
    labels = torch.tensor([0, 1, 2, 3])
    right = prediction_figure(flat_images(4), labels, logits_for([0, 1, 2, 3]), MEAN, STD)
    one_wrong = prediction_figure(flat_images(4), labels, logits_for([0, 1, 2, 4]), MEAN, STD)
    assert pixels(right, WRONG) == 0
    assert pixels(right, RIGHT) > 4 * 400
    assert pixels(one_wrong, WRONG) > 1500  # a frame of three points around 160 pixels
    assert 3 * 400 < pixels(one_wrong, RIGHT) < pixels(right, RIGHT)


def test_the_texts_say_class_and_probability(monkeypatch):
    titles = []
    from matplotlib.axes import Axes

    own = Axes.text
    monkeypatch.setattr(
        Axes, "text", lambda axis, x, y, s, **options: titles.append(s) or own(axis, x, y, s, **options)
    )
    logits = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    prediction_figure(flat_images(2), torch.tensor([0, 2]), logits, MEAN, STD)
    assert titles == ["1  58%\ntrue: 0", "2  91%\ntrue: 2"]


def test_no_more_than_sixteen_images_and_fast():
    labels = torch.zeros(40, dtype=torch.long)
    first = prediction_figure(flat_images(16), labels[:16], logits_for([0] * 16), MEAN, STD)
    started = time.process_time()
    picture = prediction_figure(flat_images(40), labels, logits_for([0] * 40), MEAN, STD)
    assert time.process_time() - started < 3  # a tenth of a second
    assert torch.equal(picture, first)
    single = prediction_figure(flat_images(1), labels[:1], logits_for([0]), MEAN, STD)
    assert single.shape[1] < picture.shape[1]
    with pytest.raises(ValueError, match="no images"):
        prediction_figure(flat_images(0), labels[:0], torch.zeros(0, 10), MEAN, STD)
