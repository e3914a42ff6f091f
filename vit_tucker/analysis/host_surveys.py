"""Finds the survey of a library's models, by the library's name; a library is imported by its users alone."""

from collections.abc import Callable, Iterable, Iterator

import timm

from vit_tucker.analysis import host_map, language_host_map
from vit_tucker.analysis.host_map import ModelEntry
from vit_tucker.errors import ConfigError
from vit_tucker.hosts.transformers_library import import_transformers

Survey = Callable[[Iterable[str]], Iterator[ModelEntry]]


def open_survey(library: str, pattern: str | None = None) -> tuple[list[str], Survey, str]:
    """Returns the names of a library's models, what surveys them, and the library's version.

    Args:
        library: "timm" or "transformers".
        pattern: of the names, with wildcards; all if None.

    Raises:
        ConfigError: the library is missing, or no name matches.
    """
    if library == "timm":
        return host_map.model_names(pattern), host_map.survey, str(timm.__version__)
    if library != "transformers":
        raise ConfigError(f"library {library}: timm or transformers")
    names = language_host_map.family_names(pattern)
    return names, language_host_map.survey_families, str(import_transformers("--library transformers").__version__)
