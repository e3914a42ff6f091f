"""Finds the file that reads a module by the library that its class is from, and imports it once such a module is met.

A new library is one file of readers with a ``FAMILY``, and one entry here; the library itself is imported by its users alone.
"""

import importlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from torch import nn

from vit_tucker.attention.call import Call
from vit_tucker.attention.effective import full_name
from vit_tucker.attention.host import HostSpec
from vit_tucker.attention.module import AttentionModule
from vit_tucker.errors import PatchError
from vit_tucker.hosts.readers import Host


@dataclass(frozen=True)
class Family:
    """The attention classes of one library.

    Attributes:
        is_self_attention: whether tokens attend to each other in a module, be it that a method of ours can take its place or not.
        is_left_alone: whether a module stands beside self-attention and stays as it is.
        read: reads a module, see ``read_host``: called with the module, its model and ``plain``.
        restore: makes a host's module fit what has become of its replacement, before it is put back.
        read_call: reads a call of a host's module, without a cache: called with the module, its spec, arguments and keywords.
        install: gives a replacement what the callers of the host's module expect of it; None: nothing.
        mark: sets up a model that was patched, or is no longer; None: nothing.
        sequence_length: returns the tokens of a model's sequences; None: the model is run on an image to find out.
    """

    is_self_attention: Callable[[nn.Module], bool]
    is_left_alone: Callable[[nn.Module], bool]
    read: Callable[[nn.Module, nn.Module | None, bool], Host]
    restore: Callable[[nn.Module, AttentionModule], None]
    read_call: Callable[[nn.Module, HostSpec, tuple[Any, ...], dict[str, Any]], Call]
    install: Callable[[AttentionModule, nn.Module], None] | None = None
    mark: Callable[[nn.Module, bool], None] | None = None
    sequence_length: Callable[[nn.Module], int] | None = None


FAMILIES = {"timm": "vit_tucker.hosts.timm_classes", "transformers": "vit_tucker.hosts.transformers_classes"}
"""Where the ``FAMILY`` of a library is, by the library's name."""
EXCLUDE = "; leave it alone with exclude="
"""What a user can do about a layer that is refused."""


@cache
def _family_of(cls: Hashable) -> Family | None:
    libraries = (base.__module__.partition(".")[0] for base in cast(type, cls).__mro__)
    place = next((FAMILIES[library] for library in libraries if library in FAMILIES), None)
    family: Family | None = None if place is None else importlib.import_module(place).FAMILY
    return family


def family_of(module: nn.Module) -> Family | None:
    """Returns the family of a module's class or of what that derives from; None for classes of other libraries."""
    return _family_of(cast(Hashable, type(module)))


def read_host(module: nn.Module, model: nn.Module | None = None, *, plain: bool = True) -> Host:
    """Reads an attention module's weights and shape.

    Args:
        module: of a model.
        model: dense or patched: it alone says whether its tables of rotations differ from head to head; None where they don't.
        plain: merge what stands around its weights, or refuse it; False: only its shape counts.

    Raises:
        PatchError: unknown class, weights that are not what it computes with, or something that no method can carry; the message
            lacks the module's name.
    """
    if isinstance(module, AttentionModule):
        raise PatchError(f"already patched ({type(module).__name__}); call vit_tucker.unpatch(model) first")
    family = family_of(module)
    if family is None:
        raise PatchError(f"unknown attention class {full_name(module)}{EXCLUDE}")
    return family.read(module, model, plain)
