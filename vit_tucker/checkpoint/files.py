"""Finds the file that a path to weights means, and what lies beside it, in folders of runs, timm, Hugging Face and DeepSpeed."""

import json
from pathlib import Path
from typing import Any

from vit_tucker.errors import CheckpointError
from vit_tucker.patching.identity import PATCHED

MODEL_KEY = "model.checkpoint"
"""What names a checkpoint in a config."""
INDEX = ".index.json"
"""Ending of the file that lists the shards of a model saved in several files."""
RUN_FOLDERS = ("checkpoints/last", "checkpoints/best", "last", "best", ".")
FILE_NAMES = (
    "ema.safetensors",
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
    "open_clip_pytorch_model.bin",
)
ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".npz", ".tar")
DEEPSPEED_LATEST = "latest"
DEEPSPEED_STATES = "mp_rank_00_model_states.pt"


def checkpoint_file(path: Path, what: str = MODEL_KEY) -> Path:
    """Returns the weights file that a path means: the path itself, or the file of a folder.

    Folders are runs (their last weights, of the EMA if there is one), checkpoints, and those of timm, Hugging Face (also in
    shards), OpenCLIP and DeepSpeed. A run's best weights were chosen on its evaluation images, so they are used only where the
    path names them (``checkpoints/best``) or nothing else is there.

    Args:
        path: file or folder.
        what: names the path, for messages.

    Raises:
        CheckpointError: there is no such file or folder, or the folder has no weights, or several files of them.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{what}: {path}: no such file or run folder")
    for folder in RUN_FOLDERS:
        for name in FILE_NAMES:
            if (file := path / folder / name).is_file():
                return file
    if (latest := path / DEEPSPEED_LATEST).is_file():
        file = path / latest.read_text(encoding="utf-8", errors="replace").strip() / DEEPSPEED_STATES
        if file.is_file():
            return file
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS and file.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found[:5])
        raise CheckpointError(f"{what}: {path} has {len(found)} weights files ({names}): name one of them")
    raise CheckpointError(
        f"{what}: {path} has no checkpoints/last/model.safetensors, no model.safetensors and no other weights file "
        f"({', '.join(ENDINGS)})"
    )


def shards_of(index: Path, what: str) -> list[Path]:
    """Returns the files that an index of shards lists, in the order of their names.

    Raises:
        CheckpointError: the index can't be read, or a shard is missing.
    """
    values = read_json(index)
    names = values.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{what}: {index} is no index of shards: it has no weight_map from tensors to files")
    files = sorted({index.parent / Path(name).name for name in names.values()})
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{what}: {index} lists {len(files)} shards, of which {', '.join(missing[:3])} is missing"
        )
    return files


def read_json(file: Path) -> dict[str, Any]:
    """Returns the mapping in a JSON file; an empty one if there is no such file or it contains something else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def config_beside(file: Path) -> dict[str, Any]:
    """Returns config.json in the folder of a weights file; an empty mapping without one."""
    return read_json(file.parent / "config.json")


def method_beside(file: Path) -> str | None:
    """Returns the method of a patched model that timm itself has saved: not its weights file, but config.json names it."""
    config = config_beside(file)
    try:
        return config["model_args"]["patch"]["method"] if config["architecture"] == PATCHED else None
    except (KeyError, TypeError):
        return None
