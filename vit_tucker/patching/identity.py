"""Tells timm what a patched model is, so that timm's own functions save it as such and not as the dense model it was.

timm writes ``pretrained_cfg["architecture"]`` and the arguments of ``create_model`` into a hub folder. Under the host's name the
weights of a patched model would fit a dense one badly: with another ``num_classes`` timm loads what fits and says nothing, so
the attention would stay untrained. So a patched model names an architecture of ours, whose arguments are the host and the patch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from vit_tucker.attention.options import MethodConfig
from vit_tucker.hosts.families import family_of
from vit_tucker.hosts.slot import SLOTS

PATCHED = "vit_tucker_patched"
"""Name of a patched model's architecture in timm's registry, see ``vit_tucker.checkpoint.entry``."""
OWN_ARGUMENTS = frozenset({"host", *(slot.argument for slot in SLOTS.values())})
"""Arguments of that architecture beside those of the host."""


@dataclass(frozen=True)
class Identity:
    """The names and arguments under which timm knew a model before it was patched.

    Attributes:
        architecture: timm name, without a tag; None if the model has none.
        has_arguments: whether it had the arguments of ``create_model``.
    """

    architecture: str | None
    has_arguments: bool


def patch_values(config: MethodConfig) -> dict[str, Any]:
    """Returns the config of a patch as JSON values: all that another machine needs, so without the backend."""
    return config.portable().model_dump(mode="json")


def identity_of(model: nn.Module) -> Identity:
    """Returns the names and arguments under which timm knows a model that is not patched."""
    cfg = vars(model).get("pretrained_cfg")
    return Identity(cfg.get("architecture") if isinstance(cfg, dict) else None, "_model_args" in vars(model))


def mark(model: nn.Module, configs: Mapping[str, MethodConfig], identity: Identity) -> None:
    """Records a model's patches where timm looks for its name and arguments; what timm has recorded since stays.

    Args:
        model: one that recorded its architecture before; others stay as they are.
        configs: of its patches by slot, with the ranks that rank rules chose; empty for a model that is no longer patched.
        identity: of the model before.
    """
    family = family_of(model)
    if family is not None and family.mark is not None:
        family.mark(model, bool(configs))
    if identity.architecture is None:
        return
    given = vars(model).get("_model_args") or {}
    arguments = {name: value for name, value in given.items() if name not in OWN_ARGUMENTS}
    if configs:
        arguments["host"] = identity.architecture
        arguments |= {slot.argument: patch_values(configs[name]) for name, slot in SLOTS.items() if name in configs}
    architecture = PATCHED if configs else identity.architecture
    set_pretrained_cfg(model, {**vars(model)["pretrained_cfg"], "architecture": architecture})
    if arguments or identity.has_arguments:
        model._model_args = arguments  # type: ignore[assignment]
    else:
        vars(model).pop("_model_args", None)


def set_pretrained_cfg(model: nn.Module, cfg: dict[str, Any]) -> None:
    """Sets timm's configuration of the weights, under both of its names."""
    model.pretrained_cfg = cfg  # type: ignore[assignment]
    model.default_cfg = cfg  # type: ignore[assignment]
