"""A method and its options in one line of text, as on the command line."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vit_tucker.config.load import validate_section
from vit_tucker.config.source import Source, read_overrides
from vit_tucker.errors import ConfigError

if TYPE_CHECKING:
    from vit_tucker.attention.base import AttentionConfig


def read_method(text: str) -> AttentionConfig:
    """Reads 'tucker ranks=[8,16,16] shared_kv=true' as a config; '8,16,16' is a list too.

    Args:
        text: name of a registered method, and ``key=value`` options in YAML as in a config's attention section.

    Raises:
        ConfigError: unknown method or option, or a value that it can't have.
    """
    from vit_tucker.attention.base import AttentionConfig  # imports torch

    return validate_section(AttentionConfig, method_source(text))  # type: ignore[type-abstract]


def method_source(text: str) -> Source:
    """Reads the same text as the ``attention`` section of a config, which is not validated yet.

    Raises:
        ConfigError: it is not of that form.
    """
    name, *options = re.split(r"\s+(?=[A-Za-z_][\w.]*=)", text.strip())
    if " " in name or "=" in name or not name:
        raise ConfigError(f"--method '{text}': written as 'NAME key=value ...'")
    bracketed = [re.sub(r"=(\d+(?:,\d+)+)$", r"=[\1]", option) for option in options]
    values = {"method": name, **read_overrides(bracketed).values}
    return Source({"attention": values}, {("attention",): f"--method '{text}'"})
