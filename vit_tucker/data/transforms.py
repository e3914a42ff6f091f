"""Transforms of a run, all from timm.data, and the normalisation that they share."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from torch import nn

from vit_tucker.config.schema import DataConfig
from vit_tucker.data.datasets import DatasetInfo
from vit_tucker.errors import ConfigError, nearest
from vit_tucker.hosts.normalisation import fit_channels

AA_POLICIES = ("original", "originalr", "v0", "v0r", "3a")
"""timm's fixed policies of AutoAugment and 3-Augment."""


def resolve_data(
    config: DataConfig,
    info: DatasetInfo,
    model: nn.Module,
    trained: bool,
    input_size: tuple[int, int, int],
    stored: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns input size, normalisation, interpolation and crop of a run.

    Values of the config come first. Else trained weights bring their own (timm's pretrained_cfg, in which ``load_host`` has put
    what lies beside a checkpoint), and a model trained from scratch uses the data set's normalisation.

    Args:
        config: data section.
        info: facts about the data set.
        model: timm model with its pretrained_cfg.
        trained: the model starts from weights, which its pretrained_cfg describes.
        input_size: channels, height, width in pixels.
        stored: what a run that goes on has used so far, in place of pretrained_cfg.

    Returns:
        timm's data config: input_size, interpolation, mean, std, crop_pct, crop_mode.

    Raises:
        ConfigError: mean or std for another number of channels.
    """
    own = {"mean": None, "std": None} if trained else {"mean": info.mean, "std": info.std}
    args: dict[str, Any] = {
        "mean": config.mean or own["mean"],
        "std": config.std or own["std"],
        "interpolation": config.interpolation if config.interpolation != "random" else None,
        "crop_pct": config.crop_pct,
        "crop_mode": config.crop_mode,
    }
    for name in ("mean", "std"):
        if (values := args[name]) is not None and len(values) not in (1, input_size[0]):
            raise ConfigError(f"data.{name}: {len(values)} values for {input_size[0]} channels")
    for name in args:
        if stored is not None and stored.get(name) is not None and getattr(config, name) in (None, "random"):
            args[name] = tuple(stored[name]) if name in ("mean", "std") else stored[name]
    resolved = resolve_data_config({"input_size": input_size, **args}, model=model)
    for name in ("mean", "std"):
        resolved[name] = fit_channels(resolved[name], input_size[0])
    return resolved


def describe_data(config: DataConfig, info: DatasetInfo, resolved: Mapping[str, Any], weights: str | None) -> str:
    """Returns one line for the log: how images are prepared, and whose mean and standard deviation they get.

    Args:
        config, info, resolved: see ``resolve_data``; ``resolved`` is its result.
        weights: names the weights that the model starts from; None for timm's initialisation.
    """
    source = "the model's pretrained_cfg"
    if config.mean or config.std:
        source = "the config"
    elif weights is not None:
        source = weights
    elif info.mean is not None:
        source = "the data set"
    mean, std = (", ".join(f"{value:.4g}" for value in resolved[name]) for name in ("mean", "std"))
    channels, height, width = resolved["input_size"]
    return (
        f"images: {channels} x {height} x {width}, mean ({mean}), std ({std}) of {source}; evaluation: "
        f"{resolved['interpolation']}, {resolved['crop_mode']} crop of {resolved['crop_pct']:.4g}"
    )


def train_transform(config: DataConfig, resolved: dict[str, Any], normalize: bool = True) -> Callable[[Any], Any]:
    """Returns timm's training transform: PIL image -> float32 (channels, height, width).

    Args:
        config: config section.
        resolved: timm's data config, see ``resolve_data``.
        normalize: False: the result is uint8.

    Raises:
        ConfigError: a policy that timm does not know, or options that it can't combine.
    """
    try:
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
    except (AssertionError, ValueError, KeyError, TypeError, IndexError) as error:
        if config.aa:
            policy = config.aa.partition("-")[0]
            raise ConfigError(
                f"data.aa: timm has no policy '{config.aa}', known: rand-m9-mstd0.5-inc1, augmix-m3-w3 (and other numbers), "
                f"{', '.join(AA_POLICIES)}{nearest(policy, ['rand', 'augmix', *AA_POLICIES])}"
            ) from None
        raise ConfigError(f"data: timm can't make the training transform: {type(error).__name__}: {error}") from None
    for op in augment_ops(transform):
        if op.name.startswith("Posterize"):
            op.aug_fn = posterize
    return transform


def augment_ops(transform: Any) -> Iterator[Any]:
    """Yields timm's AugmentOps of all policies in a composed transform."""
    for step in getattr(transform, "transforms", []):
        for part in [*getattr(step, "ops", []), *getattr(step, "policy", [])]:
            yield from part if isinstance(part, list | tuple) else [part]


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Applies timm's operation with at least 1 bit.

    timm's policies also ask for 0 bits (in 'rand-m9-mstd0.5-inc1'), which newer Pillow refuses.

    Args:
        image: of PIL.
        bits_to_keep: 0 to 8 of each channel.
        _: other options of timm's operation, not used.
    """
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, max(1, bits_to_keep))


def eval_transform(resolved: dict[str, Any], normalize: bool = True) -> Callable[[Any], Any]:
    """Returns timm's evaluation transform: PIL image -> float32 (channels, height, width); uint8 without ``normalize``."""
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
