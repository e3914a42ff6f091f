"""Stored tensors into the model that was built for them, through timm, which adapts them to other classes or image sizes."""

import sys
from typing import Any

from timm.models import load_pretrained, model_entrypoint
from torch import Tensor, nn

from vit_tucker.checkpoint.arguments import NAFLEX
from vit_tucker.checkpoint.loading import refuse_integers
from vit_tucker.checkpoint.trial import refuse_indices
from vit_tucker.errors import CheckpointError, and_more, reason_of
from vit_tucker.hosts.find import find_attention
from vit_tucker.hosts.images import input_channels
from vit_tucker.hosts.slot import LINEAR
from vit_tucker.patching.record import host_name


def fill(model: nn.Module, state: dict[str, Tensor], origin: str = "the weights") -> None:
    """Loads stored weights into the model built for them, adapted by timm to other classes, channels or image sizes.

    Args:
        model: patched or dense.
        state: the stored tensors.
        origin: what to call them.

    Raises:
        CheckpointError: they are of another model.
    """
    state = for_other_class(state, model)
    own, cfg = model.state_dict(), dict(vars(model)["pretrained_cfg"])
    attention = tuple(f"{name}." for name in (*find_attention(model), *LINEAR.layers(model)))
    missing = [key for key in own if key.startswith(attention) and key not in state]
    if missing:  # said here, since timm loads what fits once the number of classes differs
        raise CheckpointError(f"{origin}: of another model or patch: no {missing[0]}{and_more(missing)}")
    named = cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))
    # a model may do without its classifier
    strange = [key for key in state if key not in own and not key.startswith(heads)]
    if strange:
        raise CheckpointError(
            f"{origin}: of another model or patch: {strange[0]} has no place in it{and_more(strange)}"
        )
    try:
        refuse_integers(state, model)
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: {error}") from None
    refuse_indices(model, state, origin)
    fits = all(key not in own or own[key].shape == value.shape for key, value in state.items())
    try:
        load_pretrained(
            model,
            pretrained_cfg={**cfg, "state_dict": state, "source": None, "custom_load": False},
            num_classes=getattr(model, "num_classes", 0),  # which models of features don't have
            in_chans=input_channels(model) or cfg["input_size"][0],
            filter_fn=None if fits else checkpoint_filter(model),
        )
    except RuntimeError as error:
        raise CheckpointError(f"{origin}: of another model: {reason_of(error, 300)}") from None


def checkpoint_filter(model: nn.Module) -> Any:
    """Returns timm's function that adapts stored weights of the model's kind, such as to another image size; None without one."""
    place = type(model).__module__ if is_other_class(model) else entry_module(model)
    return getattr(sys.modules[place], "checkpoint_filter_fn", None)


def entry_module(model: nn.Module) -> str:
    """Returns the name of the module of timm that makes models of this name."""
    return str(model_entrypoint(str(host_name(model))).__module__)


def is_other_class(model: nn.Module) -> bool:
    """Returns whether timm has built a NaFlexVit under the name of a ViT or an EVA, as ``use_naflex`` asks for."""
    return type(model).__module__ == NAFLEX != entry_module(model)


def for_other_class(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Returns stored weights of a ViT or an EVA under the names that a NaFlexVit has for them; others as they are."""
    if not is_other_class(model) or set(state) <= set(model.state_dict()):
        return state
    converted: dict[str, Tensor] = checkpoint_filter(model)({key: value.clone() for key, value in state.items()}, model)
    return converted
