"""Pixels of every mode: by the range of the mode where it has one, by the config's else; the same for all readers."""

import numpy as np
import pytest
from PIL import Image

from tests.data.trees import opened
from vit_tucker.data.batches import BadImageError, read_image
from vit_tucker.data.image_files import ImageOptions, image_endings, list_images, read_image_file, to_mode
from vit_tucker.errors import DataError

VALUES = np.array([[0, 128, 129, 32768], [40000, 65278, 65279, 65535]], dtype=np.uint16)
EXPECTED = np.rint(VALUES.astype(float) / 257).astype(np.uint8)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_not_cut(tmp_path, ending):
    """Pillow's own convert makes every value above 255 white."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    file = tmp_path / "train" / "a" / f"x.{ending}"
    Image.fromarray(VALUES).save(file)
    for mode in ("L", "RGB"):
        found = np.asarray(read_image_file(file, mode))
        assert np.array_equal(found[..., 0] if mode == "RGB" else found, EXPECTED)
    assert np.array_equal(np.asarray(opened(tmp_path)[0][0])[..., 1], EXPECTED)  # training reads the same


def test_big_endian_and_older_pillow(tmp_path):
    big = Image.frombytes("I;16B", (4, 2), VALUES.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(to_mode(big, "L")), EXPECTED)
    older = Image.fromarray(VALUES.astype(np.int32))
    older.format = "PNG"  # Pillow before 11.? opens 16-bit PNG files so
    assert np.array_equal(np.asarray(to_mode(older, "L")), EXPECTED)


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "floating-point"), (np.int32, "32-bit integer")])
def test_images_without_a_known_range_are_bad_images(tmp_path, dtype, kind):
    values = np.array([[-5, 0, 50], [100, 200, 25]], dtype=dtype)
    (tmp_path / "train" / "a").mkdir(parents=True)
    file = tmp_path / "train" / "a" / "x.tif"
    Image.fromarray(values).save(file)
    with pytest.raises(DataError, match=rf"a {kind} image .*set data.value_range: \[low, high\]"):
        read_image_file(file, "L")
    with pytest.raises(BadImageError, match=rf"x.tif of split 'train': DataError: a {kind} image"):
        read_image(opened(tmp_path), 0, "train")
    known = np.asarray(read_image_file(file, "L", ImageOptions(value_range=(0, 100))))
    assert known.tolist() == [[0, 0, 128], [255, 255, 64]]
    assert np.asarray(opened(tmp_path, value_range=[0, 100])[0][0])[..., 0].tolist() == known.tolist()


def test_a_range_of_sixteen_bit_images_and_values_that_are_none():
    camera = Image.fromarray(np.array([[0, 4095, 2048]], dtype=np.uint16))  # 12 bits
    assert np.asarray(to_mode(camera, "L", ImageOptions(value_range=(0, 4095)))).tolist() == [[0, 255, 128]]
    holes = Image.fromarray(np.array([[np.nan, np.inf, -np.inf, 1.0]], dtype=np.float32))
    assert np.asarray(to_mode(holes, "L", ImageOptions(value_range=(0, 2)))).tolist() == [[0, 255, 0, 128]]


@pytest.mark.parametrize("source", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_eight_bits_are_pillows_own_conversion(source, mode):
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(values).convert(source)
    for options in (ImageOptions(), ImageOptions(value_range=(0, 10)), ImageOptions(exif_orientation=True)):
        assert to_mode(image, mode, options).tobytes() == image.convert(mode).tobytes()


def test_exif_orientation_is_a_key(tmp_path):
    values = np.zeros((4, 8, 3), np.uint8)
    values[:, :4] = 255
    (tmp_path / "train" / "a").mkdir(parents=True)
    file = tmp_path / "train" / "a" / "x.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(values).save(file, exif=exif)
    assert opened(tmp_path)[0][0].size == (8, 4)
    turned = opened(tmp_path, exif_orientation=True)[0][0]
    assert turned.size == (4, 8)
    assert np.array_equal(np.asarray(turned), np.rot90(values, -1))
    assert np.array_equal(np.asarray(read_image_file(file, "RGB", ImageOptions(True))), np.asarray(turned))


def test_options_travel_as_json():
    options = ImageOptions(True, (0.0, 4095.0))
    assert ImageOptions.of(options.plain()) == options
    assert ImageOptions().plain() == {}
    assert ImageOptions.of({"value_range": [1, 2]}) == ImageOptions(False, (1.0, 2.0))


def test_one_list_of_endings():
    assert {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".ppm"} <= image_endings()
    assert not {".pdf", ".eps", ".mpg", ".h5", ".fits", ".grib", ".bufr", ".wmf", ".txt", ""} & image_endings()


def test_predict_finds_what_training_finds(tmp_path):
    for name in ("b.webp", "a.PNG", ".hidden.png", "__MACOSX/c.png", "in/d.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    assert [str(file.relative_to(tmp_path)) for file in list_images([tmp_path])] == ["a.PNG", "b.webp", "in/d.tif"]
    assert list_images([tmp_path / ".hidden.png"]) == [tmp_path / ".hidden.png"]  # named, so meant
