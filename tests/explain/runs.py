"""A dense run and one patched from it, as training leaves them, but untrained: for the tests of the command."""

from pathlib import Path

import timm
import yaml

import vit_tucker as vt
from tests.reference import randomise

MODEL = {"name": "vit_tiny_patch16_224", "img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4}
LABELS = tuple("0123456789")
DATA = {"mean": (0.3,), "std": (0.4,), "interpolation": "bilinear", "crop_pct": 1.0}


def host(seed=0, **options):
    """The dense model, of grey images and ten classes."""
    arguments = {**MODEL, "num_classes": 10, "in_chans": 1, **options}
    return randomise(timm.create_model(arguments.pop("name"), **arguments), seed).eval()


def make_run(folder: Path, stored, /, **sections) -> Path:
    """config.yaml and checkpoints of a run with this model; the best and the last are the same."""
    for name in ("best", "last"):
        names = LABELS if stored.num_classes == len(LABELS) else None
        vt.save(stored, folder / "checkpoints" / name, label_names=names, data=DATA)
    config = {"model": MODEL, "data": {"dataset": "digits"}, "output_dir": "where/it/was/trained", **sections}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def make_pair(folder: Path) -> tuple[Path, Path]:
    """A dense run, and one that was patched from its weights."""
    dense = make_run(folder / "dense", host())
    model = host()
    vt.patch(model, vt.TuckerConfig(ranks=(3, 12, 12)), keep_originals=False)
    attention = {"method": "tucker", "ranks": [3, 12, 12]}
    tucker = make_run(folder / "tucker", model, model={**MODEL, "checkpoint": str(dense)}, attention=attention)
    return dense, tucker
