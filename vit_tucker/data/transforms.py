"""Transforms of a run, all from timm.data, and the normalisation that they share."""

from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from torch import nn

from vit_tucker.channels import fit_channels
from vit_tucker.config.schema import DataConfig
from vit_tucker.data.datasets import DatasetInfo
from vit_tucker.errors import ConfigError


def resolve_data(
    config: DataConfig, info: DatasetInfo, model: nn.Module, pretrained: bool, input_size: tuple[int, int, int]
) -> dict[str, Any]:
    """Input size, normalisation, interpolation and crop of a run.

    What the config says holds; else pretrained weights bring their own normalisation (timm's pretrained_cfg), and a model
    trained from scratch takes the data set's.

    Args:
        config: data section.
        info: facts about the data set.
        model: timm model with its pretrained_cfg.
        pretrained: the model starts from timm's weights.
        input_size: channels, height, width in pixels.

    Returns:
        timm's data config: input_size, interpolation, mean, std, crop_pct, crop_mode.
    """
    own = {"mean": None, "std": None} if pretrained else {"mean": info.mean, "std": info.std}
    mean, std = config.mean or own["mean"], config.std or own["std"]
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) not in (1, input_size[0]):
            raise ConfigError(f"data.{name}: {len(values)} values for {input_size[0]} channels")
    args = {
        "input_size": input_size,
        "mean": mean,
        "std": std,
        "interpolation": config.interpolation if config.interpolation != "random" else None,
        "crop_pct": config.crop_pct,
        "crop_mode": config.crop_mode,
    }
    resolved = resolve_data_config(args, model=model)
    for name in ("mean", "std"):
        resolved[name] = fit_channels(resolved[name], input_size[0])
    return resolved


def train_transform(config: DataConfig, resolved: dict[str, Any], normalize: bool = True) -> Callable[[Any], Any]:
    """timm's training transform: PIL image -> float32 (channels, height, width); uint8 without ``normalize``."""
    transform = create_transform(
        resolved["input_size"],
        is_training=True,
        no_aug=config.no_aug,
        train_crop_mode=config.train_crop_mode,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        vflip=config.vflip,
        color_jitter=config.color_jitter,
        auto_augment=config.aa,
        interpolation=config.interpolation or "random",
        mean=resolved["mean"],
        std=resolved["std"],
        re_prob=config.reprob,
        re_mode=config.remode,
        re_count=config.recount,
        normalize=normalize,
    )
    for op in augment_ops(transform):
        if op.name.startswith("Posterize"):
            op.aug_fn = posterize
    return transform


def augment_ops(transform: Any) -> Iterator[Any]:
    """timm's AugmentOps of all policies in a composed transform."""
    for step in getattr(transform, "transforms", []):
        for part in [*getattr(step, "ops", []), *getattr(step, "policy", [])]:
            yield from part if isinstance(part, list | tuple) else [part]


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's operation; its policies also ask for 0 bits (in 'rand-m9-mstd0.5-inc1'), which newer Pillow refuses: 1 then."""
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, max(1, bits_to_keep))


def eval_transform(resolved: dict[str, Any], normalize: bool = True) -> Callable[[Any], Any]:
    """timm's evaluation transform: PIL image -> float32 (channels, height, width); uint8 without ``normalize``."""
    return create_transform(
        resolved["input_size"],
        is_training=False,
        interpolation=resolved["interpolation"],
        mean=resolved["mean"],
        std=resolved["std"],
        crop_pct=resolved["crop_pct"],
        crop_mode=resolved["crop_mode"],
        normalize=normalize,
    )
