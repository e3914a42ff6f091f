"""What a patched model tells timm about itself, so that timm's own functions save what it is and not the dense model it was.

timm writes ``pretrained_cfg["architecture"]`` and the arguments of ``create_model`` into a hub folder. Under the host's name the
weights of a patched model would fit a dense one badly: with another ``num_classes`` timm loads what fits and says nothing, so
the attention would stay untrained. So a patched model names an architecture of ours, whose arguments are the host and the patch.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from vit_tucker.attention.backends import AUTO
from vit_tucker.attention.base import AttentionConfig

PATCHED = "vit_tucker_patched"
"""Name of a patched model's architecture in timm's registry, see ``vit_tucker.checkpoint.entry``."""
ATTRIBUTES = ("pretrained_cfg", "default_cfg", "_model_args")
"""Where timm looks: configuration of the weights (under two names), and the arguments of ``create_model``."""


@dataclass(frozen=True)
class Identity:
    """What a model said of itself before it was patched.

    Attributes:
        architecture: timm name, without a tag; None if the model does not tell.
        attributes: by name, those of ``ATTRIBUTES`` that it had.
    """

    architecture: str | None
    attributes: dict[str, Any]


def patch_values(config: AttentionConfig) -> dict[str, Any]:
    """The config of a patch as JSON values: all that another machine needs, so without the backend."""
    return config.model_copy(update={"backend": AUTO}).model_dump(mode="json")


def identity_of(model: nn.Module) -> Identity:
    """What a model that is not patched says of itself."""
    told = {name: vars(model)[name] for name in ATTRIBUTES if name in vars(model)}
    cfg = told.get("pretrained_cfg")
    return Identity(cfg.get("architecture") if isinstance(cfg, dict) else None, told)


def mark(model: nn.Module, config: AttentionConfig, identity: Identity) -> None:
    """Give a patched model the identity of one, if it said what it was.

    Args:
        model: patched.
        config: of the patch, with the ranks that rank rules chose.
        identity: of the model before.
    """
    if identity.architecture is None:
        return
    set_pretrained_cfg(model, {**identity.attributes["pretrained_cfg"], "architecture": PATCHED})
    arguments = identity.attributes.get("_model_args") or {}
    patch = patch_values(config)
    model._model_args = {**arguments, "host": identity.architecture, "patch": patch}  # type: ignore[assignment]


def unmark(model: nn.Module, identity: Identity) -> None:
    """Give a model back what it said of itself; what timm has recorded since, such as another image size, stays."""
    if identity.architecture is None:
        return
    set_pretrained_cfg(model, {**vars(model)["pretrained_cfg"], "architecture": identity.architecture})
    arguments = {k: v for k, v in vars(model)["_model_args"].items() if k not in ("host", "patch")}
    if arguments or "_model_args" in identity.attributes:
        model._model_args = arguments  # type: ignore[assignment]
    else:
        del model._model_args


def set_pretrained_cfg(model: nn.Module, cfg: dict[str, Any]) -> None:
    """Set timm's configuration of the weights, under both of its names."""
    model.pretrained_cfg = cfg  # type: ignore[assignment]
    model.default_cfg = cfg  # type: ignore[assignment]
