"""Models, folders and images that tests of this folder share."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import vit_tucker as vt
from tests.checkpoint.small_vit import CONFIG, SMALL, dense_vit
from tests.checkpoint.sources import SIZE


@pytest.fixture
def small_images() -> torch.Tensor:
    """(2, 3, SIZE, SIZE) float32."""
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def x() -> torch.Tensor:
    """Images for ``model``, (2, 3, 32, 32) float32."""
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def patched_vit() -> nn.Module:
    """The model that ``model`` copies and ``saved_folder`` holds; not to be changed."""
    made = dense_vit(drop_path_rate=0.1)
    vt.patch(made, CONFIG)
    return made.eval()


@pytest.fixture
def model(patched_vit: nn.Module) -> nn.Module:
    """A small patched ViT, float32, in eval mode."""
    return copy.deepcopy(patched_vit)


@pytest.fixture(scope="session")
def saved_folder(patched_vit: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``save`` has written the model; only to be read."""
    return vt.save(patched_vit, tmp_path_factory.mktemp("saved") / "model", model_args=SMALL)


@pytest.fixture
def folder(saved_folder: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(saved_folder, tmp_path / "model"))
