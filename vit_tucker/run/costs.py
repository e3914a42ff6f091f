"""Counts what a model costs, dense and with attention methods, from names alone."""

from collections.abc import Sequence

import torch

from vit_tucker.analysis.costs import HostFactory, ModelCost, Precision, model_costs
from vit_tucker.analysis.language_costs import LanguageHostFactory, language_costs
from vit_tucker.attention.base import AttentionConfig
from vit_tucker.checkpoint.language_host import is_language_model
from vit_tucker.config.load import config_from, load_config
from vit_tucker.config.method_string import read_method
from vit_tucker.errors import ConfigError
from vit_tucker.run.model import classes_and_channels


def costs(
    model: str | None,
    methods: Sequence[str] = (),
    cfg: str | None = None,
    overrides: Sequence[str] = (),
    *,
    precision: Precision = "no",
    batch_size: int = 8,
    device: torch.device | None = None,
    turns: int = 15,
) -> tuple[str, list[ModelCost]]:
    """Counts parameters, operations, activations and KV cache of a model, and measures it where a device is given.

    Args:
        model: timm model name, or "hf:" and the name of a language model; None with ``cfg``.
        methods: as ``read_method`` reads them.
        cfg: config that names the model and perhaps a method, as for ``load_config``.
        overrides: ``key.sub=value`` strings.
        precision, batch_size, device, turns: see ``vit_tucker.analysis.costs.model_costs``.

    Returns:
        Name of the model; its costs, the dense model's first.

    Raises:
        VitTuckerError: unknown names or options, or a method that does not fit the model.
    """
    chosen: list[tuple[str, AttentionConfig]] = []
    config = config_from({"model": {"name": model}}, overrides) if cfg is None else load_config(cfg, overrides)
    if cfg is not None and config.attention is not None:
        chosen.append((str(config.name), config.attention))
    chosen += [(text, read_method(text)) for text in dict.fromkeys(methods)]
    if is_language_model(config.model):
        if device is not None:
            raise ConfigError(
                f"{config.model.name}: latency of language models is not measured here; leave --measure out"
            )
        return config.model.name, language_costs(LanguageHostFactory(config.model), chosen, precision)
    host = HostFactory(config.model, *(() if cfg is None else classes_and_channels(config)))
    return config.model.name, model_costs(host, chosen, precision, batch_size, device, turns)
