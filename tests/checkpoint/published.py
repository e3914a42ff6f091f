"""Files with the names, layouts and depth of published weights (12 blocks, of small width), and what loading them reports."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoint import sources
from tests.checkpoint.sources import vit
from vit_tucker.checkpoint.host_model import load_host
from vit_tucker.config.schema import ModelConfig

SIZES = {"img_size": 224, "patch_size": 16, "embed_dim": 24, "depth": 12, "num_heads": 4}
HUGGING_FACE = {"num_hidden_layers": 12, "image_size": 224, "patch_size": 16, "num_labels": 1000}


def write(folder: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """Writes the files.

    Returns:
        For each what it is, its path below the folder, and the model section that loads it for ten classes.
    """
    plain = vit(**{**SIZES, "num_classes": 1000})
    state = plain.state_dict()
    rows: list[tuple[str, str, dict[str, Any]]] = []

    def add(what: str, file: str, content: Any, **model: Any) -> None:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
        rows.append((what, file.partition("/")[0], {"name": "vit_tiny_patch16_224", **SIZES, **model}))

    add("DeiT", "deit_tiny_patch16_224.pth", {"model": state})
    add("MAE, pretraining", "mae_pretrain_vit.pth", sources.as_mae(state), global_pool="avg")
    add("DINO, training checkpoint", "dino_checkpoint.pth", sources.as_dino(state))
    add("MoCo v3", "moco_v3.pth.tar", sources.as_moco(state))
    name = "vit_small_patch14_reg4_dinov2"
    dinov2 = vit(name, **{**SIZES, "num_classes": 0, "img_size": 518, "patch_size": 14})
    add("DINOv2 with registers", "dinov2_vits14_reg4_pretrain.pth", sources.as_dinov2(dinov2), name=name, patch_size=14)
    name = "beit_base_patch16_224"
    beit = vit(name, **{**SIZES, "init_values": 0.1})
    kwargs = {"model_kwargs": {"init_values": 0.1}}
    add("BEiT, pretraining", "beit_pt22k.pth", sources.as_beit_pretraining(beit.state_dict()), name=name, **kwargs)
    name = "vit_base_patch16_clip_224"
    clip = vit(name, **{**SIZES, "num_classes": 512})
    add("OpenCLIP", "open_clip_pytorch_model.bin", sources.as_open_clip(clip.state_dict()), name=name)
    torchvision = sources.torchvision_vit(224, 16, 12, classes=1000)
    add("torchvision", "vit_b_16.pth", torchvision.state_dict())
    lightning = {**sources.below("model.")(state), "criterion.weight": torch.ones(10)}
    add("Lightning", "last.ckpt", {"state_dict": lightning, "epoch": 3})
    add("DeepSpeed", "deepspeed/global_step7/mp_rank_00_model_states.pt", {"module": state})
    (folder / "deepspeed/latest").write_text("global_step7")
    section = {"name": "vit_tiny_patch16_224", **SIZES}
    sources.hugging_face("ViTForImageClassification", **HUGGING_FACE).save_pretrained(folder / "google-vit")
    rows.append(("Hugging Face transformers", "google-vit", section))
    sources.hugging_face("ViTForImageClassification", **HUGGING_FACE).save_pretrained(
        folder / "sharded", max_shard_size="100KB"
    )
    rows.append(("the same in shards", "sharded", section))
    np.savez(folder / "Ti_16.npz", **sources.as_jax(plain))
    rows.append(("JAX", "Ti_16.npz", section))
    return rows


def load_lines(folder: Path) -> list[str]:
    """Returns the lines that loading each file for ten classes reports, with the path below the folder."""
    lines = []
    for _, path, section in write(folder):
        _, report = load_host(ModelConfig(**section, checkpoint=str(folder / path)), 10)
        lines.append(str(report).replace(f"{folder}/", ""))
    return lines
