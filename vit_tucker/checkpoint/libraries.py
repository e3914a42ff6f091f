"""Finds the code that describes a model, writes it into a folder and rebuilds it, by the library that it is from.

A new library is one file with a ``LIBRARY``, and one entry here; the library itself is imported by its users alone.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vit_tucker.errors import CheckpointError, shorten
from vit_tucker.storage.digests import CONFIG, SECTION


@dataclass(frozen=True)
class ModelPlace:
    """A folder or a repository of the hub that a model is loaded from.

    Attributes:
        folder: None for a repository.
        hub_id: "owner/name", perhaps with "@revision"; None for a folder.
    """

    folder: Path | None
    hub_id: str | None

    @property
    def origin(self) -> str:
        """Returns what to call it in messages."""
        return str(self.folder) if self.hub_id is None else f"hf-hub:{self.hub_id}"


@dataclass(frozen=True)
class ModelLibrary:
    """The functions that make folders of one library's models and rebuild these.

    Attributes:
        describe: returns the config.json that rebuilds a model, patched or dense; called with the model and the options of
            ``vit_tucker.save`` that are given; raises CheckpointError if it could not be rebuilt identically.
        header: returns strings for the header of the weights, of a config.json.
        weights_name: returns the name of the weights in a folder, of a config.json.
        state: returns the tensors to be stored, of a model: by name, (any shape).
        write_beside: writes other files of a model into its folder; called with the model, the folder and a tokenizer or None.
        load: rebuilds a model from a place and its config.json; called with ``verify`` and overrides of ``vit_tucker.load`` too.
    """

    describe: Callable[..., dict[str, Any]]
    header: Callable[[Mapping[str, Any]], dict[str, str]]
    weights_name: Callable[[Mapping[str, Any]], str]
    state: Callable[[nn.Module], dict[str, Tensor]]
    write_beside: Callable[..., None]
    load: Callable[..., nn.Module]


LIBRARIES = {"timm": "vit_tucker.checkpoint.timm_models", "transformers": "vit_tucker.checkpoint.transformers_models"}
"""Where the ``LIBRARY`` of a library is, by the library's name."""


def library(name: str) -> ModelLibrary:
    """Returns the library of that name, imported when it is first asked for."""
    found: ModelLibrary = importlib.import_module(LIBRARIES[name]).LIBRARY
    return found


def library_of(model: nn.Module) -> ModelLibrary:
    """Returns the library that a model's class, or what that derives from, is from; timm for all others.

    Args:
        model: without wrappers.
    """
    names = (base.__module__.partition(".")[0] for base in type(model).__mro__)
    return library(next((name for name in names if name in LIBRARIES), "timm"))


def library_of_config(config: Mapping[str, Any]) -> ModelLibrary:
    """Returns the library of a config.json: the one that it names, else the one whose layout it has.

    Raises:
        CheckpointError: it names another one.
    """
    section = config.get(SECTION)
    named = section.get("library") if isinstance(section, Mapping) else None
    if named is None:
        return library("timm" if "architecture" in config else "transformers")
    if named not in LIBRARIES:
        raise CheckpointError(f"{CONFIG}: {SECTION}.library: {shorten(named)}: one of {', '.join(LIBRARIES)}")
    return library(named)
