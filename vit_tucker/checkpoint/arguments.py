"""Lists the arguments that a stored config may pass to timm: those of the model itself, never those that name files or code."""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any

import timm
from timm.models import build_model_with_cfg, model_entrypoint
from torch import nn

from vit_tucker.errors import CheckpointError, nearest
from vit_tucker.hosts.structure import without_weights
from vit_tucker.patching.identity import OWN_ARGUMENTS, PATCHED

OF_BUILDERS = frozenset(
    {
        *("features_only", "out_indices", "feature_cls", "output_stride", "use_naflex"),
        *("norm_eps", "bn_eps", "bn_momentum", "bn_tf"),
    }
)
"""Arguments that timm's functions take before they call a constructor; all of plain values."""
NAFLEX = "timm.models.naflexvit"
"""Where the classes are that timm builds in place of an architecture's own for ``use_naflex``."""
PARTS = ("transformer_", "conv_")
"""What timm's MaxxViT has before the names of arguments for its parts."""


def refuse_arguments(architecture: str, arguments: Any, origin: str) -> None:
    """Refuses what a stored config must not set, before timm sees it.

    Args:
        architecture: in timm's registry; of a patched model its ``host``.
        arguments: ``model_args`` of a config.json.
        origin: what to call the config in messages.

    Raises:
        CheckpointError: an argument that is none of the model's own, in one line that names it.
    """
    if not isinstance(arguments, Mapping):
        raise CheckpointError(f"{origin}: model_args must be a mapping of names to values, not {arguments!r:.80}")
    own = allowed_names(architecture)
    unknown = [name for name in arguments if not is_allowed(str(name), own)]
    if unknown:  # a model of the user's own may be made of classes that its module does not show
        own |= constructor_names(architecture)
        unknown = [name for name in unknown if not is_allowed(str(name), own)]
    if unknown:
        name = str(unknown[0])
        kind = "an argument of timm and not of the model" if name in machinery() else "no argument of the model"
        raise CheckpointError(
            f"{origin}: model_args.{name}: {kind} {architecture}, and a stored config may set only the model's own"
            f"{nearest(name, sorted(own))}"
        )


def is_allowed(name: str, own: Iterable[str]) -> bool:
    """Returns whether a name is one of the model's own arguments, or of one of its parts."""
    tails = {name, *(name.removeprefix(part) for part in PARTS)}
    return name not in machinery() and not tails.isdisjoint(own)


def own_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of ``timm.create_model`` that a model is made by, without those that name places."""
    return {name: value for name, value in arguments.items() if name not in machinery()}


@lru_cache
def machinery() -> frozenset[str]:
    """Returns the names that timm's functions keep for themselves: weights and their places, caches, scripting."""
    named = {"pretrained", "checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay", "state_dict"}
    return frozenset(named | parameters(timm.create_model) | parameters(build_model_with_cfg))


@lru_cache
def allowed_names(architecture: str) -> frozenset[str]:
    """Returns the names of an architecture's own arguments: of its function, and of all classes that its module makes it of."""
    if architecture == PATCHED:
        return OWN_ARGUMENTS
    function = model_entrypoint(architecture)
    found = set(OF_BUILDERS | parameters(function))
    for name in {function.__module__, NAFLEX} & sys.modules.keys():
        for value in vars(sys.modules[name]).values():
            if isinstance(value, type) and (issubclass(value, nn.Module) or is_dataclass(value)):
                found |= class_parameters(value)
    return frozenset(found - machinery())


@lru_cache
def constructor_names(architecture: str) -> frozenset[str]:
    """Returns the names of the arguments of the class that an architecture is, and of those it is derived from."""
    model = without_weights(lambda: timm.create_model(architecture, pretrained=False))
    return frozenset().union(*(class_parameters(kind) for kind in type(model).__mro__ if issubclass(kind, nn.Module)))


def class_parameters(kind: type) -> set[str]:
    """Returns the names of a class's own arguments."""
    if is_dataclass(kind):
        return {field.name for field in fields(kind)}
    return parameters(vars(kind)["__init__"]) if "__init__" in vars(kind) else set()


def parameters(function: Callable[..., Any]) -> set[str]:
    """Returns the names of a function's parameters, without those that gather the others."""
    gathering = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind not in gathering} - {"self"}
