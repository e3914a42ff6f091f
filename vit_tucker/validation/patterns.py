"""Matches names with patterns, as configs write them."""

import fnmatch
import re
from collections.abc import Iterable


def by_pattern(pattern: str, names: Iterable[str]) -> set[str]:
    """Returns the names that a pattern means; perhaps none.

    Args:
        pattern: a name with the wildcards * ? [], or 're:' and a regular expression for the full name.
        names: to choose from.

    Raises:
        ValueError: it is no regular expression; one line.
    """
    if not pattern.startswith("re:"):
        return {name for name in names if fnmatch.fnmatchcase(name, pattern)}
    try:
        return {name for name in names if re.fullmatch(pattern[3:], name)}
    except re.error as error:
        raise ValueError(f"'{pattern}' is no regular expression: {error}") from None
