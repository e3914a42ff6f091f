"""The base of all sections and options that a user writes, and the one line that a mistake in them gets.

From Python a mistake is a ``ConfigError``, as it is from YAML; pydantic's own methods (``model_validate`` and its kin) raise what
pydantic raises.
"""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from vit_tucker.errors import ConfigError
from vit_tucker.validation.mistakes import describe_mistake, shown

MAX_INTEGER = 2**63 - 1
MAX_TEXT = 4096
"""Characters of a path on Linux; no name is longer."""


class Checked(BaseModel):
    """Base of configs: frozen, unknown keys refused, numbers finite, mistakes in one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def __init__(self, **values: Any) -> None:
        """Makes the config, or raises ``ConfigError``."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            name = type(self).__name__
            raise ConfigError(describe_mistake(error, type(self), values, lambda path: name)) from None

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # for pydantic it is BaseModel's: parts skip it

    @field_validator("*")
    @classmethod
    def _usable(cls, value: Any) -> Any:
        refuse_unusable(value)
        return value


def refuse_unusable(value: Any) -> None:
    """Raises ValueError for numbers and text, also within lists and mappings, that no option can have."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"must be a finite number, not {value}")
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise ValueError("must be a number of at most 64 bits")
    if isinstance(value, str) and (len(value) > MAX_TEXT or "\0" in value):
        raise ValueError(f"must be text of at most {MAX_TEXT} characters, without NUL, not {shown(value)}")
    if isinstance(value, Mapping):
        refuse_unusable(list(value))
        refuse_unusable(list(value.values()))
    elif isinstance(value, list | tuple):
        for entry in value:
            refuse_unusable(entry)
