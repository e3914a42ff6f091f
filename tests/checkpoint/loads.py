"""Loading a weights file into the small ViT of ``sources``, as a run does."""

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.checkpoint.sources import CLASSES, MODEL
from vit_tucker.checkpoint.host_model import load_host
from vit_tucker.config.schema import ModelConfig
from vit_tucker.errors import CheckpointError


def loaded(
    file: Path, num_classes: int | None = CLASSES, in_chans: int | None = None, **options: Any
) -> tuple[nn.Module, str]:
    """The model of a file, in eval mode, and its report without the place of the file."""
    config = ModelConfig(**{**MODEL, "checkpoint": str(file), **options})
    model, report = load_host(config, num_classes, in_chans)
    return model.eval(), re.sub(r"weights: \S+: ", "", str(report))


def message_of(file: Path, *args: Any, names_file: bool = True, **options: Any) -> str:
    """The one line by which a file is refused, which names it, or what lies beside it."""
    with pytest.raises(CheckpointError) as caught:
        loaded(file, *args, **options)
    assert "\n" not in str(caught.value)
    assert str(file if names_file else file.parent) in str(caught.value)
    return str(caught.value)
