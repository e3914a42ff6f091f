"""The registry of attention methods. A method is one config class; nothing else lists it."""

from collections.abc import Callable
from typing import TypeVar

from vit_tucker.attention.base import AttentionConfig
from vit_tucker.errors import ConfigError, nearest
from vit_tucker.show.methods import MethodDisplay

_METHODS: dict[str, type[AttentionConfig]] = {}
_Config = TypeVar("_Config", bound=AttentionConfig)


def register_method(name: str) -> Callable[[type[_Config]], type[_Config]]:
    """Class decorator that makes a method available by name, in Python and in the YAML's ``attention.method``.

    Args:
        name: the method's name; the class must say ``method: Literal[name] = name``;
            ``display`` says how tables show it.

    Returns:
        The decorator; it gives the class back as it is.

    Raises:
        ConfigError: the name is taken by another class, or the class's ``method`` field differs.
    """

    def register(config: type[_Config]) -> type[_Config]:
        if not issubclass(config, AttentionConfig):
            raise ConfigError(f"{config.__name__} must derive from vit_tucker.AttentionConfig to be registered")
        if config.model_fields["method"].default != name:
            raise ConfigError(f'{config.__name__} must say method: Literal["{name}"] = "{name}"')
        if not isinstance(config.display, MethodDisplay):
            raise ConfigError(f"{config.__name__}.display must be a vit_tucker.MethodDisplay")
        known = _METHODS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (config.__module__, config.__qualname__):
            raise ConfigError(f"method '{name}' is already registered by {known.__module__}.{known.__qualname__}")
        if "display" not in vars(config):  # a subclass of another method is shown as itself
            own = {key: MethodDisplay.model_fields[key].default for key in ("name", "order", "colour", "marker")}
            config.display = config.display.model_copy(update=own)
        _METHODS[name] = config
        return config

    return register


def list_methods() -> list[str]:
    """Names of all registered methods, sorted."""
    return sorted(_METHODS)


def get_method(name: str) -> type[AttentionConfig]:
    """Config class of a method.

    Args:
        name: the method's name.

    Returns:
        The class itself; call it with the method's options.

    Raises:
        ConfigError: no such method.
    """
    if name not in _METHODS:
        raise ConfigError(
            f"unknown attention method '{name}', known: {', '.join(list_methods())}{nearest(name, _METHODS)}"
        )
    return _METHODS[name]
