"""A small finished run that commands work on, trained once."""

import os
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, PartialState

from vit_tucker.cli import train_main

RECIPE = ["model.depth=1", "model.embed_dim=32", "attention.ranks=[4, 8, 8]", "train.epochs=2", "train.warmup_epochs=0"]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tucker Attention on digits, two epochs."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    here = os.getcwd()
    os.chdir(folder.parent)
    try:
        assert train_main(["--cfg", "tucker_r16.yaml", *RECIPE, f"output_dir={folder}"]) == 0
    finally:
        os.chdir(here)
        AcceleratorState._reset_state()
        PartialState._reset_state()
    return folder
