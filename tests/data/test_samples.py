"""Images to try a model on: a fixed sample of a split with its labels, and files."""

import torch
from PIL import Image

from vit_tucker.config.schema import DataConfig
from vit_tucker.data.samples import evaluation_images, file_images

RESOLVED = {
    "input_size": (1, 16, 16), "interpolation": "bilinear", "mean": (0.5,), "std": (0.25,), "crop_pct": 1.0, "crop_mode": "center"
}  # fmt: skip


def test_a_fixed_sample_of_the_evaluation_split():
    batches = list(evaluation_images(DataConfig(), RESOLVED, 50, 20))
    assert [len(images) for images, _ in batches] == [20, 20, 10]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert images.shape == (50, 1, 16, 16)
    assert len(labels.unique()) == 10, "sorted by class"
    again = next(evaluation_images(DataConfig(), RESOLVED, 3, 20))
    assert torch.equal(again[0], images[:3])
    assert torch.equal(again[1], labels[:3])
    everything = list(evaluation_images(DataConfig(), RESOLVED, 10**6, 100))
    assert sum(len(labels) for _, labels in everything) == 360


def test_files_and_folders(tmp_path):
    for number in range(6):
        Image.new("RGB", (40, 30), (40 * number,) * 3).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    (images, labels), *rest = file_images([tmp_path], RESOLVED, 3, 8)
    assert labels is None
    assert not rest
    grey = images.mean((1, 2, 3)) * 0.25 + 0.5
    torch.testing.assert_close(grey, torch.tensor([0.0, 80.0, 160.0]) / 255)  # spread over the folder
    (alone, _), *_ = file_images([tmp_path / "5.png", tmp_path / "1.png"], RESOLVED, 8, 8)
    torch.testing.assert_close(alone.mean((1, 2, 3)) * 0.25 + 0.5, torch.tensor([200.0, 40.0]) / 255)
