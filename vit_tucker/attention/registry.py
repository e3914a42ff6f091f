"""The registry of attention methods. A method is one config class; nothing else lists it."""

from collections.abc import Callable
from typing import Any, TypeVar

from vit_tucker.attention.base import AttentionConfig
from vit_tucker.attention.options import MethodConfig
from vit_tucker.errors import ConfigError
from vit_tucker.show.methods import MethodDisplay
from vit_tucker.validation.registry import Registry

Config = TypeVar("Config", bound=MethodConfig)
Own = TypeVar("Own", bound=MethodConfig)


class MethodRegistry(Registry[type[Config]]):
    """Config classes of methods of one kind, by their names.

    Args:
        kind: 'attention method'.
        base: what they derive from.
    """

    def __init__(self, kind: str, base: type[Config]) -> None:
        super().__init__(kind)
        self.base = base

    def register(self, name: str) -> Callable[[type[Own]], type[Own]]:
        """Makes a method available by name, as a class decorator: in Python and in the YAML as the section's ``method``.

        Raises:
            ConfigError: the name is taken by another class, or the class's ``method`` field differs.
        """

        def decorate(own: type[Own]) -> type[Own]:
            config: Any = own
            if not issubclass(config, self.base):
                raise ConfigError(
                    f"{config.__name__} must derive from vit_tucker.{self.base.__name__} to be registered"
                )
            if config.model_fields["method"].default != name:
                raise ConfigError(f'{config.__name__} must declare method: Literal["{name}"] = "{name}"')
            self.add(name, config)
            return own

        return decorate


METHODS = MethodRegistry("attention method", AttentionConfig)  # type: ignore[type-abstract]


def register_method(name: str) -> Callable[[type[Own]], type[Own]]:
    """Makes an attention method available by name, as a class decorator: in Python and in the YAML's ``attention.method``.

    Args:
        name: the method's name; the class must say ``method: Literal[name] = name``; its ``display`` says how tables show it.

    Raises:
        ConfigError: see ``MethodRegistry.register``; or the display is none.
    """

    def decorate(config: type[Own]) -> type[Own]:
        shown: Any = config
        if issubclass(config, AttentionConfig) and not isinstance(config.display, MethodDisplay):
            raise ConfigError(f"{config.__name__}.display must be a vit_tucker.MethodDisplay")
        METHODS.register(name)(config)
        if "display" not in vars(config):  # a subclass of another method is shown as itself
            own = {key: MethodDisplay.model_fields[key].default for key in ("name", "order", "colour", "marker")}
            shown.display = shown.display.model_copy(update=own)
        return config

    return decorate


def list_methods() -> list[str]:
    """Names of all registered attention methods, sorted."""
    return METHODS.names()


def get_method(name: str) -> type[AttentionConfig]:
    """Returns the config class of an attention method; call it with the method's options.

    Args:
        name: the method's name.

    Raises:
        ConfigError: no such method.
    """
    return METHODS.get(name)
