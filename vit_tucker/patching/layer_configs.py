"""Resolves a config into the options of each module that it patches."""

from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import ValidationError

from vit_tucker.attention.options import MethodConfig
from vit_tucker.errors import PatchError, nearest
from vit_tucker.hosts.slot import slot_of
from vit_tucker.patching.selection import select

PLACEMENT_FIELDS = {*MethodConfig.model_fields, "calibration"}
Config = TypeVar("Config", bound=MethodConfig)


def choose_layers(config: MethodConfig, names: list[str]) -> list[str]:
    """Names of the modules that the config patches, in the model's order.

    Raises:
        PatchError: a pattern selects nothing, or nothing is left.
    """
    noun = slot_of(config).noun
    chosen = select(config.layers, names, noun)
    if config.exclude is not None:
        excluded = set(select(config.exclude, names, noun))
        chosen = [name for name in chosen if name not in excluded]
    if not chosen:
        raise PatchError(f"layers and exclude together leave no {noun} to patch")
    return chosen


def layer_configs(config: Config, names: list[str], chosen: Iterable[str]) -> dict[str, Config]:
    """Returns the config of each chosen layer: the rules in order, a later one overrides an earlier one.

    Ranks that a rank rule chose apply only while the layer's ranks are still that rule; a later rule may change them.

    Args:
        config: the config of the whole model.
        names: full names of all modules that the slot's methods could replace, in the model's order.
        chosen: those among them that the config patches.

    Raises:
        PatchError: a rule selects nothing, or an option is unknown or invalid.
    """
    configs = dict.fromkeys(chosen, config)
    noun = slot_of(config).noun
    valid = set(type(config).model_fields) - PLACEMENT_FIELDS
    for number, rule in enumerate(config.rules):
        for key in rule.options:
            if key not in valid:
                raise PatchError(f"rules[{number}]: unknown option '{key}' of {config.method}{nearest(key, valid)}")
        hit = [name for name in select(rule.layers, names, noun) if name in configs]
        if not hit and rule.chosen_by is None:
            raise PatchError(f"rules[{number}]: layers={rule.layers!r} selects no patched module")
        for name in hit:
            if rule.chosen_by is None or rule.chosen_by == configs[name].rank_rule:
                configs[name] = _with_options(configs[name], rule.options, name)
    return configs


def without_stale_choices(config: Config, names: list[str], chosen: Iterable[str]) -> Config:
    """Returns the config without ranks that were chosen by a rule which no layer has any more.

    Args:
        config: the config of the whole model.
        names, chosen: as of ``layer_configs``.
    """
    written = config.without_choices()
    current = {layer.rank_rule for layer in layer_configs(written, names, chosen).values()}
    kept = tuple(rule for rule in config.rules if rule.chosen_by is None or rule.chosen_by in current)
    return config if len(kept) == len(config.rules) else config.model_copy(update={"rules": kept})


def _with_options(config: Config, extra: dict[str, Any], name: str) -> Config:
    if not extra:
        return config
    values = {key: getattr(config, key) for key in type(config).model_fields}
    try:
        return type(config).model_validate({**values, **extra})
    except ValidationError as error:
        first = error.errors()[0]
        raise PatchError(f"{name}: a rule's {first['loc'][0]} is invalid: {first['msg']}") from None


def describe_options(config: MethodConfig) -> str:
    """Returns the method's own options that differ from their defaults, 'ranks=8,16,16 shared_kv=True'."""
    parts = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name not in PLACEMENT_FIELDS and (field.is_required() or value != field.default):
            parts.append(f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join(parts)
