"""Loading weights into a timm model as it is made: timm adapts them, and what it does is observed."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import timm
import timm.models._builder as builder
import torch
from torch import Tensor, nn

from vit_tucker.errors import CheckpointError, and_more, reason_of

Shapes = dict[str, tuple[int, ...]]
SHOWN = 6
"""Names that a report lists one by one; more are counted."""


@dataclass
class ObservedLoad:
    """Records what timm did while it loaded weights into a model.

    Attributes:
        model: the model.
        given: shapes of the tensors before timm's filter.
        filtered: shapes after it, before classifier and channels are adapted.
        loaded: shapes as they went into the model.
        missing: names of the model's tensors that were not loaded.
        unexpected: names of tensors that have no place in the model.
        dropped: names of tensors that timm's filter leaves out.
        strict: timm itself wants all tensors of the file used.
    """

    model: nn.Module
    given: Shapes = field(default_factory=dict)
    filtered: Shapes = field(default_factory=dict)
    loaded: Shapes = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    strict: bool = True


def shapes_of(state: Mapping[str, Any]) -> Shapes:
    """Returns the shapes of the tensors of a state dict."""
    return {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}


@contextmanager
def observed_loads(size: tuple[int, int] | None = None) -> Iterator[list[ObservedLoad]]:
    """Yields a list in which timm's functions note what they load into the models that they make.

    timm returns a model without what it could not load, and checks nothing once the number of classes differs. All of its models
    get their weights by one function of its builder, which is wrapped here; what the weights lack is judged afterwards.

    Args:
        size: height and width of the images that the weights were trained on, from which timm knows the grid of their positions;
            the model's own if None.
    """
    loads: list[ObservedLoad] = []
    original = builder.load_pretrained

    def load_pretrained(
        model: nn.Module,
        pretrained_cfg: dict[str, Any] | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        filter_fn: Callable[..., Any] | None = None,
        strict: bool = True,
        **options: Any,
    ) -> None:
        load = ObservedLoad(model, strict=strict)
        cfg = pretrained_cfg if pretrained_cfg is not None else getattr(model, "pretrained_cfg", {})

        def filtered(state: Any, own: nn.Module = model) -> Any:
            load.given = shapes_of(state)
            channels, *own_size = cfg.get("input_size") or (3, 224, 224)
            if size is not None:
                cfg["input_size"] = (channels, *size)
            if filter_fn is not None:
                before, state = state, adapted(filter_fn, dict(state), own)
                load.dropped = dropped(before, state)
            cfg["input_size"] = (channels, *own_size)
            refuse_integers(state, own)
            load.filtered = shapes_of(state)
            describe_source(cfg, load.filtered)
            return state

        def load_state_dict(state: Mapping[str, Any], strict: bool = True, **rest: Any) -> Any:
            load.loaded = shapes_of(state)
            refuse_other_sizes(load.loaded, shapes_of(model.state_dict()))
            result = type(model).load_state_dict(model, state, strict=False, **rest)
            load.missing, load.unexpected = list(result.missing_keys), list(result.unexpected_keys)
            return type(result)([], [])  # so that timm does not warn of what is judged and reported here

        if cfg.get("custom_load"):
            load.missing = loaded_by_the_model(model, lambda: original(model, cfg, num_classes, in_chans, **options))
        else:
            model.load_state_dict = load_state_dict  # type: ignore[method-assign, assignment]
            try:
                original(model, cfg, num_classes, in_chans, filter_fn=filtered, strict=strict, **options)
            finally:
                del model.load_state_dict
        loads.append(load)

    builder.load_pretrained = load_pretrained
    try:
        yield loads
    finally:
        builder.load_pretrained = original


def adapted(filter_fn: Callable[..., Any], state: dict[str, Any], model: nn.Module) -> Any:
    """Returns a state dict after timm's filter of the model.

    Args:
        filter_fn: the model's ``checkpoint_filter_fn``.
        state: tensors of the weights by name.
        model: that they are for.

    Raises:
        CheckpointError: timm can't adapt it; names tensors that only one of both has.
    """
    given, own = shapes_of(state), shapes_of(model.state_dict())
    try:
        try:
            return filter_fn(state, model)
        except TypeError:  # of one argument, in older models
            return filter_fn(state)
    except (RuntimeError, AssertionError, ValueError) as error:
        missing, strange = [key for key in own if key not in given], [key for key in given if key not in own]
        what = f"{describe_misfit(missing, strange)}; " if missing or strange else ""
        raise CheckpointError(f"{what}timm can't adapt it ({reason_of(error, 150)})") from None


def dropped(given: Mapping[str, Any], filtered: Mapping[str, Any]) -> list[str]:
    """Returns the names of tensors that a filter has left out; those that it has only renamed lie where they were in memory.

    Args:
        given, filtered: the state dict before and after; where tensors were joined or split, no names can be had.
    """
    places = [{id_of(value) for value in state.values() if isinstance(value, Tensor)} for state in (given, filtered)]
    made = [key for key, value in filtered.items() if key not in given and id_of(value) not in places[0]]
    if made:
        return ["mask_token"] if "mask_token" in given and "mask_token" not in filtered else []
    return [key for key, value in given.items() if key not in filtered and id_of(value) not in places[1]]


def id_of(value: Tensor) -> tuple[int, int]:
    """Returns the address and size of a tensor ``value`` (any shape): equal for two views of the same values."""
    return value.data_ptr(), value.numel()


def describe_source(cfg: dict[str, Any], state: Shapes) -> None:
    """Sets the number of classes and the image channels of weights in hand (``state_dict``) in timm's pretrained_cfg of them."""
    if not cfg.get("state_dict"):
        return
    heads = [state[f"{name}.weight"] for name in module_names(cfg.get("classifier")) if f"{name}.weight" in state]
    cfg["num_classes"] = heads[0][0] if heads else 0
    stems = [state[f"{name}.weight"] for name in module_names(cfg.get("first_conv")) if f"{name}.weight" in state]
    if stems and len(stems[0]) == 4:
        _, *size = cfg.get("input_size") or (3, 224, 224)
        cfg["input_size"] = (stems[0][1], *size)


def module_names(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns module names as timm's pretrained_cfg has them: none, one or several."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def refuse_other_sizes(loaded: Shapes, own: Shapes) -> None:
    """Raises CheckpointError if tensors have other sizes than the model's."""
    other = [key for key in own if key in loaded and loaded[key] != own[key]]
    if other:
        first = other[0]
        raise CheckpointError(f"{first} is {loaded[first]} in the weights, {own[first]} in the model{and_more(other)}")


def refuse_integers(state: Mapping[str, Any], model: nn.Module) -> None:
    """Raises CheckpointError if whole numbers would become weights: a quantised checkpoint has scales beside them."""
    for name, parameter in model.named_parameters():
        value = state.get(name)
        if isinstance(value, Tensor) and parameter.is_floating_point() and not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise CheckpointError(f"{name} is {kind}: a quantised checkpoint; save it in float16, bfloat16 or float32")


def loaded_by_the_model(model: nn.Module, load: Callable[[], None]) -> list[str]:
    """Calls a function that loads weights into a model, as timm's for JAX files; returns the names of tensors that it left out.

    These keep their initialisation. The model is on the CPU.
    """
    before = {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}
    missing = []
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name in before:
                value.fill_(math.nan)
    load()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name in before and bool((unset := value.isnan()).any()):
                value.copy_(torch.where(unset, before[name], value))
                missing.append(name)
    return missing


def describe_misfit(missing: list[str], strange: list[str]) -> str:
    """Returns in a few words what weights don't have, and what a model does not have."""
    parts = [f"it has no {name_list(missing)}"] if missing else []
    parts += [f"the model has no {name_list(strange)}"] if strange else []
    return " and ".join(parts)


def name_list(names: Collection[str]) -> str:
    """Returns names with commas between them; where there are many, how many there are of each first part."""
    if len(names) <= SHOWN:
        return ", ".join(names)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    parts = [found if len(found) <= 2 else [f"{first}.* ({len(found)})"] for first, found in groups.items()]
    shown = [name for found in parts for name in found]
    more = [f"and {len(shown) - SHOWN} more"] if len(shown) > SHOWN else []
    return ", ".join(shown[:SHOWN] + more)


def create_model(
    name: str, size: tuple[int, int] | None = None, **arguments: Any
) -> tuple[nn.Module, ObservedLoad | None]:
    """Makes a timm model, and notes what was loaded into it.

    Args:
        name: timm's, of the model.
        size: see ``observed_loads``.
        arguments: of ``timm.create_model``.

    Returns:
        The model, and what was loaded; None if nothing was.
    """
    with observed_loads(size) as loads:
        model = timm.create_model(name, **arguments)
    return model, loads[-1] if loads else None
