"""The config and the report of a patched model as its layers are now: they may have been resized since the patch."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from vit_tucker.attention.base import ParameterCount
from vit_tucker.attention.module import AttentionModule
from vit_tucker.attention.options import MethodConfig, Rule
from vit_tucker.errors import PatchError
from vit_tucker.hosts.slot import slot_of
from vit_tucker.hosts.tokens import count_calls
from vit_tucker.patching.layer_configs import Config, describe_options, layer_configs
from vit_tucker.patching.report import LayerReport, PatchReport


def current_config(model: nn.Module, config: Config) -> Config:
    """Returns a patch's config with the ranks that the layers have: itself if none was resized, else with a rule for each.

    Args:
        model: patched.
        config: of the patch, with ranks; as the layers were when it was last asked for.
    """
    slot = slot_of(config)
    layers: dict[str, Any] = slot.layers(model)
    if not any(layer.rank_options() for layer in layers.values()):
        return config
    try:
        stated = layer_configs(config, list(slot.find(model, config.layers)), layers)
    except PatchError:  # timm has pruned blocks that rules name
        return config
    resized: dict[int | str | tuple[int | str, ...], dict[str, Any]] = {
        name: layer.rank_options()
        for name, layer in layers.items()
        if layer.rank_options() != stated[name].rank_options()
    }
    if not resized:
        return config
    kept = [
        rule
        for rule in config.rules
        if rule.layers not in resized or rule.options.keys() != resized[rule.layers].keys()
    ]
    return config.model_copy(update={"rules": (*kept, *(Rule(layers=n, **o) for n, o in resized.items()))})


def current_report(
    model: nn.Module,
    report: PatchReport,
    before: MethodConfig,
    config: MethodConfig,
    shared: Iterable[object] = (),
) -> PatchReport:
    """Returns the report with new rows for resized layers: the errors of their conversion no longer apply.

    Args:
        model: patched.
        report: as it was.
        before, config: of the patch, when the report was made and now.
        shared: objects that a copy of the model shares with it.
    """
    slot = slot_of(config)
    layers, names = slot.layers(model), list(slot.find(model, config.layers))
    then, now = layer_configs(before, names, layers), layer_configs(config, names, layers)
    tokens = count_calls(model, {name: slot.counter(layer) for name, layer in layers.items()}, shared=shared)

    def row(old: LayerReport) -> LayerReport:
        if old.name not in layers or now[old.name].rank_options() == then[old.name].rank_options():
            return old
        layer, (earlier, later) = layers[old.name], (then[old.name], now[old.name])
        spec: Any = layer.spec
        if isinstance(layer, AttentionModule):
            spec = replace(spec, extras={name: {} for name in layer.extras})  # without their parameters, which stay
        gone, come = earlier.count_parameters(spec), later.count_parameters(spec)
        params = ParameterCount(*(a - b + c for a, b, c in zip(old.params_after, gone, come, strict=True)))
        flops, (calls, length) = old.flops_after, tokens.get(old.name, (0, 0))
        if flops is not None:
            flops += calls * (later.count_flops(spec, length) - earlier.count_flops(spec, length))
        return replace(
            old,
            options=describe_options(later),
            params_after=params,
            flops_after=flops,
            errors=dict.fromkeys(slot.columns),
        )

    return replace(report, layers=tuple(row(old) for old in report.layers))
