"""Weights as their authors publish them: small models of other libraries, and timm's own in the layouts of training scripts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from tests.reference import randomise

WIDTH, BLOCKS, HEADS, CLASSES, SIZE, PATCH = 24, 2, 4, 5, 16, 4
ARGUMENTS = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": BLOCKS, "num_heads": HEADS}
MODEL = {"name": "vit_tiny_patch16_224", **ARGUMENTS}
"""The model section that fits ``vit()``."""
HUGGING_FACE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
    "image_size": SIZE,
    "patch_size": PATCH,
    "num_labels": CLASSES,
}


def vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    """A small timm ViT with random weights, float32, in eval mode."""
    arguments = {**ARGUMENTS, "num_classes": CLASSES, **options}
    return randomise(timm.create_model(name, **arguments)).eval()


def hugging_face(kind: str, **options: Any) -> nn.Module:
    """A small model of transformers with random weights, in eval mode.

    Args:
        kind: class name, such as ViTForImageClassification.
        options: of its config.
    """
    import transformers

    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**HUGGING_FACE, **options}))
    return randomise(model).eval()


def torchvision_vit(size: int = SIZE, patch: int = PATCH, blocks: int = BLOCKS, classes: int = CLASSES) -> nn.Module:
    """A small ViT of torchvision with random weights, in eval mode."""
    from torchvision.models import VisionTransformer

    return randomise(VisionTransformer(size, patch, blocks, HEADS, WIDTH, 4 * WIDTH, num_classes=classes)).eval()


def as_mae(state: dict[str, Tensor]) -> dict[str, Any]:
    """MAE's pretraining file of a ViT: no classifier, a decoder, and the masked patch's token."""
    encoder = {key: value for key, value in state.items() if not key.startswith("head.")}
    decoder = {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_pos_embed": torch.zeros(1, 17, 8),
        "decoder_embed.weight": torch.zeros(8, WIDTH),
        "decoder_blocks.0.norm1.weight": torch.ones(8),
        "decoder_pred.bias": torch.zeros(48),
    }
    return {"model": {**encoder, **decoder}}


def as_dino(state: dict[str, Tensor]) -> dict[str, Any]:
    """DINO's training checkpoint: student and teacher, each a backbone and a projection head."""
    backbone = {key: value for key, value in state.items() if not key.startswith("head.")}
    head = {"head.mlp.0.weight": torch.ones(8, WIDTH), "head.last_layer.weight_v": torch.ones(9, 8)}
    teacher = {**{f"backbone.{key}": value for key, value in backbone.items()}, **head}
    student = {f"module.{key}": value + 1 for key, value in teacher.items()}
    return {"student": student, "teacher": teacher, "epoch": 3, "optimizer": {"state": {}}}


def as_moco(state: dict[str, Tensor]) -> dict[str, Any]:
    """MoCo v3's checkpoint: a base and a momentum encoder whose classifier is a projection, and a predictor."""
    backbone = {key: value for key, value in state.items() if not key.startswith("head.")}
    base = {**backbone, "head.0.weight": torch.ones(8, WIDTH), "head.1.running_mean": torch.zeros(8)}
    momentum = {key: value + 1 for key, value in base.items()}
    both = {**below("module.base_encoder.")(base), **below("module.momentum_encoder.")(momentum)}
    return {"state_dict": {**both, "module.predictor.0.weight": torch.ones(8, 8)}, "arch": "vit_small"}


def as_dinov2(model: nn.Module) -> dict[str, Tensor]:
    """DINOv2's file with registers: their positions, and that of the class token, stand apart."""
    state = dict(model.state_dict())
    positions = torch.cat([state["cls_token"], state["pos_embed"]], 1)
    registers = {"register_tokens": state.pop("reg_token"), "mask_token": torch.zeros(1, WIDTH)}
    return {**state, **registers, "cls_token": torch.zeros(1, 1, WIDTH), "pos_embed": positions}


def as_beit_pretraining(state: dict[str, Tensor]) -> dict[str, Any]:
    """BEiT's pretraining file: one position bias for all blocks, a head for visual words, a norm of all tokens."""
    shared = state["blocks.0.attn.relative_position_bias_table"]
    dropped = ("head.", "fc_norm.")
    kept = {k: v for k, v in state.items() if "relative_position" not in k and not k.startswith(dropped)}
    pretraining = {
        "rel_pos_bias.relative_position_bias_table": shared,
        "rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64),
        "mask_token": torch.zeros(1, 1, WIDTH),
        "norm.weight": state["fc_norm.weight"],
        "norm.bias": state["fc_norm.bias"],
        "lm_head.weight": torch.zeros(11, WIDTH),
        "lm_head.bias": torch.zeros(11),
    }
    return {"model": {**kept, **pretraining}}


def as_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's names of a ViT with a norm before its blocks, and the beginning of a text tower."""
    swaps = (
        ("patch_embed.proj.", "conv1."),
        ("norm_pre.", "ln_pre."),
        ("blocks.", "transformer.resblocks."),
        (".norm", ".ln_"),
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj.", "attn.out_proj."),
        ("mlp.fc1.", "mlp.c_fc."),
        ("mlp.fc2.", "mlp.c_proj."),
    )
    result = {}
    for key, value in state.items():
        for mine, theirs in swaps:
            key = key.replace(mine, theirs)
        key = f"ln_post.{key.removeprefix('norm.')}" if key.startswith("norm.") else key
        result[f"visual.{key}"] = value
    result["visual.class_embedding"] = result.pop("visual.cls_token")[0, 0]
    result["visual.positional_embedding"] = result.pop("visual.pos_embed")[0]
    result["visual.proj"] = result.pop("visual.head.weight").T
    result.pop("visual.head.bias")
    text = {"token_embedding.weight": torch.zeros(7, 8), "transformer.resblocks.0.ln_1.weight": torch.ones(8)}
    return {**result, **text, "logit_scale": torch.tensor(4.6)}


def as_jax(model: nn.Module, root: str = "", **extra: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of the original JAX file of a timm ViT."""
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    arrays = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for number in range(len(model.blocks)):
        mine, theirs = f"blocks.{number}.", f"Transformer/encoderblock_{number}/"
        width = state[f"{mine}norm1.weight"].shape[0]
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        for name, weight, bias in zip(
            ("query", "key", "value"),
            np.split(state[f"{mine}attn.qkv.weight"], 3),
            np.split(state[f"{mine}attn.qkv.bias"], 3),
            strict=True,
        ):
            arrays[f"{attention}{name}/kernel"] = weight.T.reshape(width, HEADS, -1)
            arrays[f"{attention}{name}/bias"] = bias.reshape(HEADS, -1)
        arrays[f"{attention}out/kernel"] = state[f"{mine}attn.proj.weight"].T.reshape(HEADS, -1, width)
        arrays[f"{attention}out/bias"] = state[f"{mine}attn.proj.bias"]
        for layer, dense in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            arrays[f"{theirs}MlpBlock_3/{dense}/kernel"] = state[f"{mine}mlp.{layer}.weight"].T
            arrays[f"{theirs}MlpBlock_3/{dense}/bias"] = state[f"{mine}mlp.{layer}.bias"]
        for layer, norm in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{theirs}{norm}/scale"] = state[f"{mine}{layer}.weight"]
            arrays[f"{theirs}{norm}/bias"] = state[f"{mine}{layer}.bias"]
    return {f"{root}{key}": value for key, value in {**arrays, **extra}.items()}


def below(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A layout: all names below a prefix."""
    return lambda state: {f"{prefix}{key}": value for key, value in state.items()}
