"""What a plug-in may bring to a recipe by name: penalties of the loss, and rules of an optimizer step."""

import json
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from vit_tucker.errors import ConfigError, nearest
from vit_tucker.validation.checked import Checked
from vit_tucker.validation.mistakes import describe_mistake

Entry = TypeVar("Entry", bound=Callable[..., Any])


class Registry(Generic[Entry]):
    """Functions or classes by the name that a config gives them.

    Args:
        kind: what they are, for messages: 'penalty'.
        reserved: names that none may have.
    """

    def __init__(self, kind: str, reserved: tuple[str, ...] = ()) -> None:
        self.kind, self.reserved = kind, reserved
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> None:
        """Make an entry available by its name.

        Raises:
            ConfigError: the name is no identifier, is reserved, or is taken by another entry.
        """
        if not name.isidentifier() or name in self.reserved:
            raise ConfigError(
                f"a {self.kind} can't be named '{name}': letters, digits and _, and none of {self.reserved}"
            )
        known = self._entries.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (entry.__module__, entry.__qualname__):
            raise ConfigError(f"{self.kind} '{name}' is already registered by {known.__module__}.{known.__qualname__}")
        self._entries[name] = entry

    def get(self, name: str) -> Entry:
        """The entry of that name.

        Raises:
            ConfigError: there is none.
        """
        if name not in self._entries:
            known = ", ".join(sorted(self._entries)) or "none (a plug-in registers them)"
            raise ConfigError(f"unknown {self.kind} '{name}', known: {known}{nearest(name, self._entries)}")
        return self._entries[name]


PENALTIES: Registry[Callable[..., Any]] = Registry("penalty", reserved=("label", "distill", "features"))
"""Functions of the model; the reserved names are those of the loss's other terms."""
STEP_RULES: Registry[type[Any]] = Registry("step rule")
"""Classes, each made from its options: an instance of its attribute ``Options``, a ``Checked``."""


def step_options(given: dict[str, Any]) -> Checked:
    """The options of a step rule, strictly validated as all of a config is.

    Args:
        given: ``name``, and the options.

    Raises:
        ConfigError: unknown name or option, or a wrong value.
    """
    options = {key: value for key, value in given.items() if key != "name"}
    model: type[Checked] = STEP_RULES.get(given["name"]).Options
    try:
        return model.model_validate_json(json.dumps(options), strict=True)
    except ValidationError as error:
        line = describe_mistake(error, model, options, lambda path: given["name"])
        raise ConfigError(line) from None
