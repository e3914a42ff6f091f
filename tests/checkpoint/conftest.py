"""Images for the small models of this folder."""

import pytest
import torch

from tests.checkpoint.sources import SIZE


@pytest.fixture
def small_images() -> torch.Tensor:
    """(2, 3, SIZE, SIZE) float32."""
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
