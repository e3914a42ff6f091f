"""Labels are known, and checked, before any image is decoded."""

import numpy as np
import pytest
from torch.utils.data import Subset

from tests.data.test_datasets import write_folder
from tests.data.trees import opened, tree
from vit_tucker.config.schema import DataConfig, TrainConfig
from vit_tucker.data.classes import refuse_label
from vit_tucker.data.datasets import ArrayDataset
from vit_tucker.data.labels import check_labels, labels_of
from vit_tucker.data.loaders import build_loaders
from vit_tucker.data.splits import open_split
from vit_tucker.data.vision import ConvertedDataset
from vit_tucker.errors import DataError

RESOLVED = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}
RESOLVED |= {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}


class Fake:
    """A set of torchvision's kind whose images can't be read."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise AssertionError("decoded")


def test_labels_of_every_kind_of_set(tmp_path):
    tree(tmp_path / "folders", ["train/a/1.png", "train/b/1.png", "train/b/2.png"])
    folders = opened(tmp_path / "folders")
    assert labels_of(folders).tolist() == [0, 1, 1]
    assert labels_of(Subset(folders, [2, 0])).tolist() == [1, 0]
    assert labels_of(ArrayDataset(np.zeros((2, 4, 4), np.uint8), np.array([7, 3], np.uint8), "L")).tolist() == [7, 3]
    for name in ("targets", "labels", "_labels"):
        assert labels_of(ConvertedDataset(Fake(**{name: [5, 0, 2]}), "L")).tolist() == [5, 0, 2]
    assert labels_of(ConvertedDataset(Fake(), "L")) is None
    assert labels_of(ConvertedDataset(Fake(targets=[[1, 2], [3], []]), "L")) is None
    write_folder(tmp_path / "images", splits=("train",))
    stored = open_split(DataConfig(dataset=f"hfds/{tmp_path}/images", root=str(tmp_path / "cache")), "train", True, 3)
    assert labels_of(stored).tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 2, 1], r"split 'val': label 2 of image 1, but there are 2 classes, 0 to 1; set model.num_classes"),
        ([0, 1, -1], r"split 'val': label -1 of image 2: labels begin with 0; a split without labels"),
    ],
)
def test_labels_that_the_model_lacks_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        check_labels(ConvertedDataset(Fake(targets=labels), "L"), 2, "val")
    check_labels(ConvertedDataset(Fake(targets=[0, 1, 1]), "L"), 2, "val")
    with pytest.raises(DataError, match="label 9 of x.png, but there are 1,000 classes, 0 to 999"):
        refuse_label(9, 1000, "val", "x.png")


def test_loaders_refuse_them_before_the_first_batch():
    data, recipe = DataConfig(num_workers=0), TrainConfig(global_batch_size=8)
    with pytest.raises(DataError, match=r"split 'train': label \d of image \d+, but there are 3 classes"):
        build_loaders(data, recipe, RESOLVED, 0, 0, 1, False, num_classes=3)
    with pytest.raises(DataError, match=r"split 'validation': label"):
        build_loaders(data, recipe, RESOLVED, 0, 0, 1, False, with_train=False, num_classes=3)
    assert build_loaders(data, recipe, RESOLVED, 0, 0, 1, False, num_classes=10).label_names == tuple("0123456789")
