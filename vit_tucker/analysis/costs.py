"""Counts what a timm model costs with several attention methods, on models without weights; measures it if asked for."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vit_tucker.analysis.flops import count_model_flops
from vit_tucker.analysis.interleaved import PRECISIONS
from vit_tucker.analysis.kv_cache import count_kv_entries
from vit_tucker.analysis.latency import Latency, measure_latency
from vit_tucker.analysis.training_memory import own_activation_bytes
from vit_tucker.attention.base import AttentionConfig
from vit_tucker.attention.variants.mha import MHAConfig
from vit_tucker.checkpoint.host_model import count_parameters, create_host
from vit_tucker.config.schema import ModelConfig
from vit_tucker.errors import ConfigError, PatchError
from vit_tucker.hosts.images import input_shape
from vit_tucker.hosts.structure import structure_copy, without_weights
from vit_tucker.patching.patch import patch, plan
from vit_tucker.patching.record import patch_record
from vit_tucker.training.task import ImageTask

Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class ModelCost:
    """The costs of one model; None where they are not known.

    Attributes:
        label: of its attention.
        attention_params: parameters of its attention layers, biases included.
        params: all parameters.
        attention_flops: operations of its attention layers per image, 2 per multiply-add.
        flops: of the whole forward pass; None where it needs values.
        activation_bytes: highest sum of bytes beyond model, gradients and optimizer in a training pass, per image.
        kv_bytes: KV cache of all attention layers for the tokens of one image.
        latency: of forward passes, in turns with the dense model.
        per: what operations, activations and KV cache are of: "image", or "1,024 tokens" of a language model.
    """

    label: str
    attention_params: int
    params: int
    attention_flops: int | None
    flops: int | None
    activation_bytes: int | None
    kv_bytes: int | None
    latency: Latency | None
    per: str = "image"

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON and tables; those of the latency are None or nested."""
        return asdict(self)


class HostFactory:
    """Makes one timm model, as often as it is needed.

    Args:
        config: model section; its weights are loaded only where ranks are chosen from them.
        num_classes, in_chans: see ``create_host``.
    """

    def __init__(self, config: ModelConfig, num_classes: int | None = None, in_chans: int | None = None) -> None:
        self.config, self.sizes = config, (num_classes, in_chans)

    def structure(self) -> nn.Module:
        """Returns the model without weights, on the meta device where it can be."""
        return without_weights(self.random)

    def random(self) -> nn.Module:
        """Returns the model with timm's initialisation."""
        return create_host(self.config.untrained(), *self.sizes)

    def trained(self) -> nn.Module:
        """Returns the model with its weights."""
        return create_host(self.config, *self.sizes)


def model_costs(
    host: HostFactory,
    methods: Sequence[tuple[str, AttentionConfig]],
    precision: Precision = "no",
    batch_size: int = 8,
    device: torch.device | None = None,
    turns: int = 15,
    seconds: float = 0.2,
) -> list[ModelCost]:
    """Counts, and measures if asked for, the costs of the dense model and of the model with each method.

    Args:
        host: of all of them.
        methods: label and config of each. What is converted does not matter here; ranks that a rule chooses do.
        precision: of training, KV cache and measurement.
        batch_size: images per training step and per measured forward pass.
        device: where latency is measured; None: it is not.
        turns, seconds: of the measurement, see ``measure_latency``.

    Raises:
        VitTuckerError: a method does not fit the model; its label is named.
    """
    chosen = [(label, resolved(host, label, config)) for label, config in methods]
    variants: list[tuple[str, AttentionConfig | None]] = [("dense", None), *chosen]
    size = input_shape(host.structure(), host.config.img_size)
    latencies: dict[str, Latency] = {}
    if device is not None:
        models = {label: patched(host.random(), label, config, size).to(device) for label, config in variants}
        latencies = measure_latency(models, size, batch_size, device, precision, turns, seconds)
        del models
    return [
        count_costs(host.structure(), label, config, size, precision, batch_size, latencies.get(label))
        for label, config in variants
    ]


def count_costs(
    model: nn.Module,
    label: str,
    config: AttentionConfig | None,
    size: tuple[int, int, int],
    precision: Precision,
    batch_size: int,
    latency: Latency | None,
) -> ModelCost:
    """Returns all that is counted on a dense model without weights, which gets the method, beside what was measured.

    Args:
        model: dense, without weights; patched in place.
        label: of the row, also in messages.
        config: of the method, None for dense.
        size: (channels, height, width) of the images.
        precision: for bytes of activations and KV cache.
        batch_size: images of a training step.
        latency: as measured, None if it was not.
    """
    attention_flops = dense_attention_flops(model, size)
    record = patch_record(patched(model, label, config, size))
    if record is not None and attention_flops is not None:
        before, after = record.report.flops_before, record.report.flops_after
        attention_flops = None if before is None or after is None else attention_flops - before + after
    entries = count_kv_entries(model, size[1:])
    total, attention = count_parameters(model)
    kv_bytes = None if entries is None else entries * PRECISIONS[precision].itemsize
    activations, flops = activations_per_image(model, size, batch_size, precision), count_model_flops(model, size)
    return ModelCost(label, attention, total, attention_flops, flops, activations, kv_bytes, latency)


def resolved(host: HostFactory, label: str, config: AttentionConfig) -> AttentionConfig:
    """Returns the config with nothing left to convert or to choose; ranks are chosen by the weights alone.

    Args:
        host: makes the dense model, with or without weights.
        label: of the method, for messages.
        config: of the method.

    Raises:
        ConfigError: ranks are to be chosen from weights, and there are none.
    """
    config = config.unconverted()
    if config.rank_rule is None or any(rule.chosen_by == config.rank_rule for rule in config.rules):
        return config
    if not host.config.is_trained:
        raise ConfigError(
            f"{label}: ranks {config.rank_rule} are chosen from weights; add model.pretrained=true or model.checkpoint=FILE, "
            "or give the ranks"
        )
    record = patch_record(patched(host.trained(), label, config, None))
    assert record is not None
    return record.config


def patched(
    model: nn.Module, label: str, config: AttentionConfig | None, size: tuple[int, int, int] | None
) -> nn.Module:
    """Patches a model in place and returns it; as it is for None.

    Args:
        model: patched in place.
        label: of the method, for messages.
        config: of the method, None for dense.
        size: (channels, height, width) of the images, None for the model's own.

    Raises:
        PatchError: the method can't replace the attention of the model.
    """
    if config is not None:
        try:
            patch(model, config, keep_originals=False, img_size=None if size is None else size[1:])
        except PatchError as error:
            raise PatchError(f"{label}: {error}") from None
    return model


def dense_attention_flops(model: nn.Module, size: tuple[int, int, int]) -> int | None:
    """Returns the operations of a dense model's attention layers per image, None if one of them is not known.

    Args:
        model: dense, on any device.
        size: (channels, height, width) of the images.
    """
    try:
        return plan(model, MHAConfig(init="random"), img_size=size[1:]).flops_before
    except PatchError:
        return None


def activations_per_image(
    model: nn.Module, size: tuple[int, int, int], batch_size: int, precision: Precision
) -> int | None:
    """Returns bytes of a training pass per image, by fake tensors: those of the CPU's kernels, without memory or arithmetic.

    None if the model computes with values, which fake tensors don't have.

    Args:
        model: on any device; not changed.
        size: (channels, height, width) of the images.
        batch_size: images of a training step.
        precision: "no", "fp16" or "bf16".
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            copied = structure_copy(model, "cpu")
            return round(own_activation_bytes(copied, ImageTask(size), batch_size, precision, False) / batch_size)
    except Exception:
        return None
