"""The small patched ViT whose folder the tests of ``save`` and ``load`` read, copy and damage."""

import json
from pathlib import Path
from typing import Any

import timm
from torch import nn

import vit_tucker as vt
from tests.reference import randomise

TIMM_TELLS = hasattr(timm.models, "get_model_args")
"""timm records the arguments of create_model, and reads ``local-dir:`` models."""
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 5}
CONFIG = vt.TuckerConfig(ranks=(2, 8, 8), exclude=[0], rules=({"layers": 2, "ranks": (3, 16, 12)},))


def dense_vit(seed: int = 0, **options: Any) -> nn.Module:
    """Returns the host with random weights, float32, in eval mode."""
    return randomise(timm.create_model("vit_tiny_patch16_224", **{**SMALL, **options}), seed).eval()


def edit(folder: Path, **changes: Any) -> None:
    """Changes entries of a folder's config.json; None takes one out."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        *above, last = key.split("__")
        entry = config
        for part in above:
            entry = entry[part]
        entry.pop(last, None) if value is None else entry.update({last: value})
    (folder / "config.json").write_text(json.dumps(config))
