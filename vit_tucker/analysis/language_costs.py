"""Counts what a language model of transformers costs with several attention methods, on models without weights."""

from collections.abc import Sequence

import torch
from torch import nn

from vit_tucker.analysis.costs import HostFactory, ModelCost, Precision, patched, resolved
from vit_tucker.analysis.flops import known_flops
from vit_tucker.analysis.interleaved import PRECISIONS
from vit_tucker.analysis.kv_cache import count_kv_entries
from vit_tucker.attention.base import AttentionConfig
from vit_tucker.attention.variants.mha import MHAConfig
from vit_tucker.checkpoint.host_model import count_parameters
from vit_tucker.checkpoint.language_host import load_language_model
from vit_tucker.errors import PatchError
from vit_tucker.hosts.tokens import count_tokens, sequence_unit
from vit_tucker.patching.patch import plan
from vit_tucker.patching.record import patch_record


class LanguageHostFactory(HostFactory):
    """Makes one language model of transformers, as often as it is needed; arguments as of ``HostFactory``."""

    def random(self) -> nn.Module:
        """Returns the model with transformers' initialisation."""
        return load_language_model(self.config.untrained())

    def trained(self) -> nn.Module:
        """Returns the model with its weights."""
        return load_language_model(self.config)


def language_costs(
    host: LanguageHostFactory, methods: Sequence[tuple[str, AttentionConfig]], precision: Precision = "no"
) -> list[ModelCost]:
    """Counts the costs of the dense model and of the model with each method, for a text as long as its positions, 4,096 at most.

    Args:
        host: of all of them.
        methods: label and config of each; ranks that a rule chooses need weights.
        precision: of the KV cache.

    Raises:
        VitTuckerError: a method does not fit the model; its label is named.
    """
    chosen = [(label, resolved(host, label, config)) for label, config in methods]
    variants: list[tuple[str, AttentionConfig | None]] = [("dense", None), *chosen]
    return [count_language_costs(host.structure(), label, config, precision) for label, config in variants]


def count_language_costs(
    model: nn.Module, label: str, config: AttentionConfig | None, precision: Precision
) -> ModelCost:
    """Returns what is counted on a dense model without weights, which gets the method.

    Args:
        model: dense, without weights; patched in place.
        label: of the row, also in messages.
        config: of the method, None for dense.
        precision: of the KV cache.
    """
    try:
        attention_flops = plan(model, MHAConfig(init="random")).flops_before
    except PatchError:
        attention_flops = None
    record = patch_record(patched(model, label, config, None))
    if record is not None:
        attention_flops = record.report.flops_after
    ((_, length),) = count_tokens(model, {"": "sequence"}).values()
    entries, (total, attention) = count_kv_entries(model), count_parameters(model)
    kv_bytes = None if entries is None else entries * PRECISIONS[precision].itemsize
    flops = known_flops(model, (length,), torch.long)
    return ModelCost(label, attention, total, attention_flops, flops, None, kv_bytes, None, sequence_unit(model))
