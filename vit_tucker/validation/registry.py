"""Registries: what a user's own file may add to by name, such as methods, penalties and step rules."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from vit_tucker.errors import ConfigError, nearest

Entry = TypeVar("Entry", bound=Callable[..., Any])


class Registry(Generic[Entry]):
    """Functions or classes by the name that a config gives them.

    Args:
        kind: what they are, for messages: 'attention method'.
        reserved: names that none may have.
        identifiers: names must be letters, digits and _: they become columns of tables.

    Attributes:
        entries: what is registered, by name.
    """

    def __init__(self, kind: str, reserved: tuple[str, ...] = (), identifiers: bool = False) -> None:
        self.kind, self.reserved, self.identifiers = kind, reserved, identifiers
        self.entries: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> None:
        """Makes an entry available by its name; the same one again, from a file that was imported anew, replaces itself.

        Raises:
            ConfigError: the name is reserved, no identifier where it must be, or taken by another entry.
        """
        if name in self.reserved:
            raise ConfigError(f"a {self.kind} can't be named '{name}': {', '.join(self.reserved)} are reserved")
        if self.identifiers and not name.isidentifier():
            raise ConfigError(f"a {self.kind} can't be named '{name}': letters, digits and _ alone")
        known = self.entries.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (entry.__module__, entry.__qualname__):
            raise ConfigError(f"{self.kind} '{name}' is already registered by {known.__module__}.{known.__qualname__}")
        self.entries[name] = entry

    def names(self) -> list[str]:
        """Returns the names of all entries, sorted."""
        return sorted(self.entries)

    def get(self, name: str) -> Entry:
        """Returns the entry of a name; raises ConfigError if there is none."""
        if name not in self.entries:
            known = ", ".join(self.names()) or "none (a plug-in registers them)"
            raise ConfigError(f"unknown {self.kind} '{name}', known: {known}{nearest(name, self.entries)}")
        return self.entries[name]
