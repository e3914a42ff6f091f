"""Reads the method and options that a call of ``patch`` or ``plan`` asks for."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from vit_tucker.attention.options import MethodConfig
from vit_tucker.errors import ConfigError, nearest, nearest_match
from vit_tucker.hosts.slot import SLOTS
from vit_tucker.validation.mistakes import shown

Method = MethodConfig | str | Mapping[str, Any]
"""A config; a method's name; or a mapping with ``method`` and options, as in a YAML's attention or linear section."""
ARGUMENTS = ("layers", "exclude", "calibration", "keep_originals", "img_size")
"""Arguments of ``patch`` beside the method's options."""


def method_config(model: Any, method: Method, options: Mapping[str, Any]) -> MethodConfig:
    """Returns the config that a call means; the same object if one is given.

    Args:
        model: what is to be patched, for its type alone.
        method: a config, a method's name, or a mapping of ``method`` and options.
        options: of the method, beside its name.

    Raises:
        ConfigError: of another type; an unknown method or option, with the nearest name; options beside a whole config.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model must be a torch.nn.Module, not {shown(model)}")
    if isinstance(method, str):
        config = named(method)
        for name in set(options) - set(config.model_fields):
            if (argument := nearest_match(name, [*config.model_fields, *ARGUMENTS])) in ARGUMENTS:
                raise ConfigError(f"{name}: neither an argument nor an option of {method}; did you mean '{argument}'?")
        return config(**options)
    if not isinstance(method, MethodConfig | Mapping):
        written = "TuckerConfig(ranks=(8, 16, 16)), 'tucker' with its options as keywords, or {'method': 'tucker', ...}"
        if isinstance(method, type) and issubclass(method, MethodConfig):
            raise ConfigError(f"the method is the class {method.__name__}; give a config: {method.__name__}(...)")
        raise ConfigError(f"the method must be a config or a name, not {shown(method)}; write {written}")
    if options:
        name = next(iter(options))
        hint = nearest(name, ARGUMENTS) or "; options go into the config, or beside a method's name"
        raise ConfigError(f"{name}: not accepted together with a config object{hint}")
    if isinstance(method, MethodConfig):
        return method
    given = {str(key): value for key, value in method.items()}
    chosen = given.get("method")
    if not isinstance(chosen, str):
        what = "missing" if chosen is None else f"must be a name, not {shown(chosen)}"
        raise ConfigError(f"method: {what}; write {{'method': 'tucker', ...}}")
    return named(chosen)(**given)


def named(name: str) -> type[MethodConfig]:
    """Returns the config class of the method of a name, of whatever slot; attention methods come first.

    Raises:
        ConfigError: no such method; names all there are.
    """
    known: dict[str, type[MethodConfig]] = {}
    for slot in reversed(SLOTS.values()):
        known |= slot.methods.entries
    if name not in known:
        listed = "; ".join(f"{slot.methods.kind}s: {', '.join(slot.methods.names())}" for slot in SLOTS.values())
        raise ConfigError(f"unknown method '{name}'{nearest(name, list(known))}; {listed}")
    return known[name]
