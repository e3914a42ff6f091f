"""Images of the command: files, folders, evaluation images, and those that can't be read."""

import numpy as np
import pytest
import torch
from PIL import Image

from vit_tucker.config.schema import DataConfig
from vit_tucker.data.batches import Normalise
from vit_tucker.data.transforms import eval_transform
from vit_tucker.errors import DataError
from vit_tucker.explain.images import data_images, images_in_files, to_picture, to_pixels


def save(file, value=0, size=(6, 5)):
    file.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, (value, 0, 255)).save(file)
    return file


def test_files_and_folders_in_order_with_names_of_their_own(tmp_path):
    single = save(tmp_path / "cat.png", 9)
    for name in ("b.jpg", "cat.png", "a.webp"):
        save(tmp_path / "folder" / name)
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    images = images_in_files([single, tmp_path / "folder"], "RGB")
    assert [image.name for image in images] == ["cat", "a", "b", "cat-2"]
    assert images[0].source == str(single)
    assert images[0].read().getpixel((0, 0)) == (9, 0, 255)
    assert images_in_files([single], "L")[0].read().mode == "L"


@pytest.mark.parametrize("kind", ["missing", "text", "torn", "empty"])
def test_what_can_not_be_read_is_named(tmp_path, kind):
    path = tmp_path / "x.png"
    messages = {
        "missing": "x.png: no such file or folder",
        "text": "x.png: can't be read as an image: cannot identify image file",
        "torn": "x.png: can't be read as an image: ",
        "empty": "x.png: the folder has no images",
    }
    if kind == "text":
        path.write_text("not an image")
    if kind == "torn":
        save(path, size=(60, 60))
        path.write_bytes(path.read_bytes()[:60])
    if kind == "empty":
        path.mkdir()
    with pytest.raises(DataError, match=messages[kind]) as caught:
        images_in_files([save(tmp_path / "good.png"), path], "RGB")
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("x.png") == 1


def test_evaluation_images_with_their_classes():
    images = data_images(DataConfig(dataset="digits"), 3, "L")
    assert [image.name for image in images] == ["validation-0000", "validation-0001", "validation-0002"]
    assert [image.label for image in images] == [1, 4, 8]  # of the fixed split
    assert images[0].read().size == (8, 8)
    for count in (0, 361):
        with pytest.raises(DataError, match=f"--data {count}: the evaluation split of digits has 360 images"):
            data_images(DataConfig(dataset="digits"), count, "L")


def test_what_the_model_sees_is_what_timms_transform_gives():
    data = {"input_size": (3, 8, 8), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bicubic"}
    data |= {"crop_pct": 0.9, "crop_mode": "center"}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8))
    pixels = to_pixels(image, eval_transform(data, normalize=False))
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 8, 8))
    seen = Normalise(data["mean"], data["std"])(pixels)
    torch.testing.assert_close(
        seen, eval_transform(data)(image), rtol=0, atol=1e-5
    )  # timm divides by 255 first, float32
    assert np.array_equal(to_picture(pixels)[2, 3], pixels[:, 2, 3].numpy())
    assert to_picture(pixels[:1]).shape == (8, 8, 3)
