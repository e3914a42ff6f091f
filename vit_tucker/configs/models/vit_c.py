"""ViT-C: timm's VisionTransformer behind a stem of 3x3 convolutions, for small images and few epochs.

A config takes it by ``plugins: [experiments/models/vit_c.py]`` and ``model.name: vit_c``; the arguments are those of timm's
VisionTransformer, and ``stem_channels``. Source: Xiao et al., Early Convolutions Help Transformers See Better, arXiv 2106.14881.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem, HybridEmbed

default_cfgs = generate_default_cfgs(
    {
        "vit_c": {
            "input_size": (3, 28, 28),
            "num_classes": 1000,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "first_conv": "patch_embed.backbone.0.conv",
            "classifier": "head",
        }
    }
)


@register_model
def vit_c(
    pretrained: bool = False,
    stem_channels: Sequence[int] = (32, 64, 64, 128, 128, 256),
    stem_strides: Sequence[int] = (1, 2, 1, 2, 1, 2),
    fused_attn: bool | None = None,
    **kwargs: Any,
) -> VisionTransformer:
    """Builds a ViT whose patch embedding is a stem of convolutions (ViT-C).

    Args:
        pretrained: weights must be given by ``model.checkpoint``: there are none to download.
        stem_channels: of each convolution. The last is the embed_dim.
        stem_strides: of each convolution; their product is the pixels per token and side.
        fused_attn: attention on scaled_dot_product_attention; None: as timm decides. For bfloat16 on a CPU false is faster: the
            backward pass of torch's kernel is slow there.
        kwargs: of VisionTransformer.

    Returns:
        A ViT with one token per pixel of the stem's output.

    Raises:
        ValueError: as many strides as channels are needed.
    """
    if len(stem_channels) != len(stem_strides):
        raise ValueError(
            f"stem_channels {tuple(stem_channels)} and stem_strides {tuple(stem_strides)} differ in length"
        )
    stem = ConvStem(
        kwargs.get("in_chans", 3),
        len(stem_channels),
        tuple(stem_channels),
        kernel_size=3,
        stride=tuple(stem_strides),
        padding=1,
    )
    arguments = {"img_size": 28, "patch_size": 1, "embed_dim": stem_channels[-1], **kwargs}
    model = build_model_with_cfg(
        VisionTransformer, "vit_c", pretrained, embed_layer=partial(HybridEmbed, backbone=stem, proj=False), **arguments
    )
    if fused_attn is not None:
        for block in model.blocks:
            block.attn.fused_attn = fused_attn
    return model
