"""Folders that a run, ``vit_tucker.save``, timm or a sweep has written: they may have come from elsewhere, and are data."""

import os
from pathlib import Path

SIGNS = {
    "config.yaml": (
        *("checkpoints", "results.json", "data_config.json", "patch.json", "classes.json", "train.log", "started.json"),
        *("summary.csv", "teacher", "config.json", "run.lock"),
    ),
    "config.json": ("model.safetensors", "ema.safetensors", "pytorch_model.bin", "state.json"),
    "sweep.yaml": ("results.jsonl", "tables.md"),
}
"""What such a folder has, and one of what stands beside it there."""


def is_stored(folder: Path) -> bool:
    """Returns whether a folder is a run, a checkpoint, a saved model or a kept study."""
    return any(
        (folder / main).is_file() and any((folder / name).exists() for name in beside) for main, beside in SIGNS.items()
    )


def stored_folder(path: Path) -> Path | None:
    """Returns the stored folder that a path lies in, as it is written or where its links lead; None if it lies in none."""
    places = (Path(os.path.abspath(path)), path.resolve())
    return next((folder for place in places for folder in place.parents if is_stored(folder)), None)
