"""Throughput of stored models and of timm models with attention methods, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vit_tucker.analysis.bench import bench_models
from vit_tucker.analysis.costs import patched
from vit_tucker.checkpoint.host_model import create_host
from vit_tucker.config.method_string import read_method
from vit_tucker.config.schema import ModelConfig
from vit_tucker.errors import ConfigError
from vit_tucker.hosts.images import input_shape
from vit_tucker.inference.predict import open_model


def bench(
    models: Sequence[str],
    methods: Sequence[str] = (),
    *,
    img_size: int | None = None,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    precision: str = "no",
    turns: int = 10,
    training: bool = False,
) -> list[dict[str, Any]]:
    """Measures images per second of models in turns, so that noise hits all alike.

    Args:
        models: timm model names, built without pretrained weights; run folders, saved folders.
        methods: as ``read_method`` reads them; each timm model is also measured with each.
        img_size: pixels, in place of the models' own size.
        batch_size: images per pass.
        device, precision, turns, training: see ``vit_tucker.analysis.bench.bench_models``.

    Returns:
        A row per model under the names of timm's benchmark script, see ``bench_models``.

    Raises:
        VitTuckerError: an unknown name, or models that take different images.
    """
    built = build(models, methods, img_size)
    sizes = {name: input_shape(model, img_size) for name, model in built.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {'x'.join(map(str, size))}" for name, size in sizes.items())
        raise ConfigError(f"the models accept different images ({listed}); give --img-size, or compare them one by one")
    size = next(iter(sizes.values()))
    return bench_models(built, size, batch_size, torch.device(device), precision, turns, training=training)


def build(models: Sequence[str], methods: Sequence[str], img_size: int | None) -> dict[str, nn.Module]:
    """Returns the models by name: as stored, or made by timm, dense and with each method.

    Args:
        models: folders, hub names or names of timm models.
        methods: as on the command line, such as "gqa:num_kv_heads=4".
        img_size: pixels of a square, None for each model's own.

    Raises:
        ConfigError: methods are given for stored models alone.
    """
    found: dict[str, nn.Module] = {}
    for name in dict.fromkeys(models):
        if Path(name).exists() or "/" in name:
            found[name] = open_model(name, **({} if img_size is None else {"img_size": img_size}))
            continue
        config = ModelConfig(name=name, img_size=img_size)
        found[name] = create_host(config)
        for text in dict.fromkeys(methods):
            method = read_method(text).unconverted()
            found[f"{name} {text}"] = patched(create_host(config), text, method, None)
    if methods and not any(name.partition(" ")[2] for name in found):
        raise ConfigError("--method is for timm model names; stored models have their attention already")
    return found
