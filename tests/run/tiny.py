"""Tiny whole runs on the embedded digits, in this process: one block of width 32, 5 steps of 64 images in each of 2 epochs."""

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vit_tucker.config.load import load_config
from vit_tucker.config.schema import RunConfig
from vit_tucker.run.run import run as run_shown
from vit_tucker.training.monitor import NullMonitor

TINY = ["model.depth=1", "model.embed_dim=32", "model.num_heads=4", "train.epochs=2", "train.warmup_epochs=0.5"]
TINY += ["data.num_samples=320", "train.global_batch_size=64", "train.lr=2e-3"]
RANKS = "attention.ranks=[3, 8, 8]"
_trained: dict[str, tuple[Path, dict[str, Any]]] = {}
_kept = tempfile.TemporaryDirectory()


def config(*overrides: str, base: str = "digits/tucker_r16") -> RunConfig:
    """A tiny run, with the ranks (3, 8, 8) unless others are given."""
    given = any(override.startswith("attention.ranks=") for override in overrides)
    return load_config(base, [*TINY, *([RANKS] if "tucker" in base and not given else []), *overrides])


def run(given: RunConfig, *options: bool, monitor: NullMonitor | None = None, **more: Any) -> dict[str, Any]:
    """``vit_tucker.run.run.run`` without TensorBoard and its pictures, which take half of a tiny run's time."""
    return run_shown(given, *options, monitor=NullMonitor() if monitor is None else monitor, **more)


def trained(given: RunConfig) -> dict[str, Any]:
    """Results of a run that is trained once for all tests; its folder is copied to where it would be."""
    key = given.model_dump_json()
    if key not in _trained:
        results = run(given)
        _trained[key] = Path(_kept.name, str(len(_trained))), results
        shutil.copytree(given.output_dir, _trained[key][0], symlinks=True)
    elif not Path(given.output_dir).exists():
        shutil.copytree(_trained[key][0], given.output_dir, symlinks=True)
    return copy.deepcopy(_trained[key][1])


def weights(folder: str, which: str = "last") -> dict[str, torch.Tensor]:
    """Weights of a run's checkpoint."""
    return load_file(Path(folder, "checkpoints", which, "model.safetensors"))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
