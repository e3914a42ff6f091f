"""Loading weights into a timm model as it is made: timm adapts them, and what it did is observed, judged and reported."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import timm
import timm.models._builder as builder
import torch
from torch import Tensor, nn

from vit_tucker.checkpoint.layouts import BUFFERS
from vit_tucker.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]
SHOWN = 6
"""Names that a report lists one by one; more are counted."""
PRE_LOGITS = (
    "its classifier needs the layer {}, which timm's model no longer has; another number of classes (model.num_classes) makes "
    "a new classifier"
)


@dataclass(frozen=True)
class LoadReport:
    """What was loaded into a model.

    Attributes:
        origin: file, or timm's name of the weights.
        total: tensors of the model.
        new: names of those that the weights don't have, which are as timm initialises them.
        resampled: phrases such as 'pos_embed 37x37 -> 16x16', of tensors that timm adapted to other sizes.
        left_out: names of tensors of the file that the model has no use for.
        source: the layout, and where in the file the weights lie; '' for timm's own layout.
        classifier: names of the model's classifier tensors.
    """

    origin: str
    total: int
    new: tuple[str, ...] = ()
    resampled: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    source: str = ""
    classifier: tuple[str, ...] = ()

    @property
    def has_classifier(self) -> bool:
        """Whether the model's classifier comes from the weights."""
        return bool(self.classifier) and not set(self.new) & set(self.classifier)

    def __str__(self) -> str:
        """One line: '150 of 152 tensors; new: head.weight, head.bias; resampled: pos_embed 37x37 -> 16x16'."""
        parts = [f"{self.total - len(self.new)} of {self.total} tensors"]
        if self.source:
            parts[0] += f" ({self.source})"
        for what, names in (("new", self.new), ("resampled", self.resampled), ("left out", self.left_out)):
            if names:
                parts.append(f"{what}: {listed(names)}")
        return f"weights: {self.origin}: {'; '.join(parts)}"


def listed(names: Collection[str]) -> str:
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


@dataclass
class Load:
    """What timm did while it loaded weights into a model.

    Attributes:
        model: the model.
        given: shapes of the tensors before timm's filter.
        filtered: shapes after it, before classifier and channels are adapted.
        loaded: shapes as they went into the model.
        missing: names of the model's tensors that were not loaded.
        unexpected: names of tensors that have no place in the model.
        strict: timm itself wants all tensors of the file used.
    """

    model: nn.Module
    given: Shapes = field(default_factory=dict)
    filtered: Shapes = field(default_factory=dict)
    loaded: Shapes = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    strict: bool = True


def shapes_of(state: Mapping[str, Any]) -> Shapes:
    """Returns the shapes of the tensors of a state dict."""
    return {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}


@contextmanager
def observed_loads(size: tuple[int, int] | None = None) -> Iterator[list[Load]]:
    """Context in which timm's functions note what they load into the models that they make, in the list that it gives.

    timm returns a model without what it could not load, and checks nothing once the number of classes differs. All of its models
    get their weights by one function of its builder, which is wrapped here; what the weights lack is judged afterwards.

    Args:
        size: height and width of the images that the weights were trained on, from which timm knows the grid of their positions;
            the model's own if None.
    """
    loads: list[Load] = []
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
        load = Load(model, strict=strict)
        cfg = pretrained_cfg if pretrained_cfg is not None else getattr(model, "pretrained_cfg", {})

        def filtered(state: Any, own: nn.Module = model) -> Any:
            load.given = shapes_of(state)
            channels, *own_size = cfg.get("input_size") or (3, 224, 224)
            if size is not None:
                cfg["input_size"] = (channels, *size)
            if filter_fn is not None:
                try:
                    state = filter_fn(dict(state), own)
                except TypeError:  # of one argument, in older models
                    state = filter_fn(dict(state))
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
            return result

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


def describe_source(cfg: dict[str, Any], state: Shapes) -> None:
    """Has timm's configuration of the weights say what they are: their number of classes, and their image channels.

    Args:
        cfg: timm's pretrained_cfg, of weights in hand (``state_dict``); that of published weights stays as it is.
        state: shapes of the tensors, in timm's names.
    """
    if not cfg.get("state_dict"):
        return
    heads = [state[f"{name}.weight"] for name in names_of(cfg.get("classifier")) if f"{name}.weight" in state]
    cfg["num_classes"] = heads[0][0] if heads else 0
    stems = [state[f"{name}.weight"] for name in names_of(cfg.get("first_conv")) if f"{name}.weight" in state]
    if stems and len(stems[0]) == 4:
        _, *size = cfg.get("input_size") or (3, 224, 224)
        cfg["input_size"] = (stems[0][1], *size)


def names_of(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns module names as timm's pretrained_cfg has them: none, one or several."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def refuse_other_sizes(loaded: Shapes, own: Shapes) -> None:
    """Raises CheckpointError if tensors have other sizes than the model's."""
    other = [key for key in own if key in loaded and loaded[key] != own[key]]
    if other:
        first, more = other[0], f" (and {len(other) - 1} more)" if len(other) > 1 else ""
        raise CheckpointError(f"{first} is {loaded[first]} in the weights, {own[first]} in the model{more}")


def refuse_integers(state: Mapping[str, Any], model: nn.Module) -> None:
    """Raises CheckpointError if whole numbers would become weights: a quantised checkpoint holds scales beside them."""
    for name, parameter in model.named_parameters():
        value = state.get(name)
        if isinstance(value, Tensor) and parameter.is_floating_point() and not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise CheckpointError(f"{name} is {kind}: a quantised checkpoint; save it in float16, bfloat16 or float32")


def loaded_by_the_model(model: nn.Module, load: Callable[[], None]) -> list[str]:
    """Loads weights by a function that does not tell what it has set, as timm's for JAX files.

    Args:
        model: on the CPU; what is not loaded keeps its initialisation.
        load: sets parameters of the model.

    Returns:
        Names of the tensors that were not set.
    """
    before = {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}
    state = model.state_dict()
    with torch.no_grad():
        for name in before:
            state[name].fill_(math.nan)
    load()
    missing = []
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name in before and bool((unset := value.isnan()).any()):
                value.copy_(torch.where(unset, before[name], value))
                missing.append(name)
    return missing


def judged(
    load: Load, origin: str, added: Callable[[], Collection[str]], source: str = "", left_out: Collection[str] = ()
) -> LoadReport:
    """Decides whether a model may be used with what was loaded into it.

    New may be a classifier that the weights don't have for these classes, a norm after the pooling where the weights have one
    before it and no classifier (so MAE and BEiT are fine-tuned), and what the config itself adds to the architecture.

    Args:
        load: what timm did.
        origin: names the weights.
        added: names of the model's tensors that are there by arguments of the config alone; asked for only where some are new.
        source, left_out: see ``LoadReport``.

    Raises:
        CheckpointError: other tensors would stay as they were initialised, or tensors of the weights would not be used.
    """
    model, cfg = load.model, vars(load.model).get("pretrained_cfg") or {}
    classifier = [f"{name}.{kind}" for name in names_of(cfg.get("classifier")) for kind in ("weight", "bias")]
    own = set(model.state_dict())
    same_classes = cfg.get("num_classes") == getattr(model, "num_classes", None)
    pooled = has_norm_before_pooling(load, own) and not any(key in load.filtered for key in classifier)
    allowed_new = set() if same_classes and any(key in load.filtered for key in classifier) else set(classifier)
    if pooled:
        allowed_new |= {key for key in own if key.startswith("fc_norm.")}
    if set(load.missing) - allowed_new:
        allowed_new |= set(added())
    wrong = [key for key in load.missing if key not in allowed_new]
    dropped = [key for key in load.given if key not in load.loaded and (key in classifier or key == "mask_token")]
    unused = [key for key in load.unexpected if not BUFFERS.search(key)]
    norm_unused = bool({"fc_norm.weight"} & (set(load.missing) & allowed_new))
    strange = [key for key in unused if key not in classifier and not (norm_unused and key.startswith("norm."))]
    if wrong or (strange and load.strict):
        raise CheckpointError(misfit(load, wrong, strange))
    refuse_pre_logits(load, classifier)
    return LoadReport(
        origin,
        len(own),
        tuple(load.missing),
        tuple(resampled(load, model)),
        tuple(dict.fromkeys([*unused, *dropped, *left_out])),
        source,
        tuple(key for key in classifier if key in own),
    )


def has_norm_before_pooling(load: Load, own: set[str]) -> bool:
    """Whether the weights end in a norm of all tokens, and the model in one of their mean."""
    return "fc_norm.weight" in own and "norm.weight" in load.filtered and "fc_norm.weight" not in load.filtered


def refuse_pre_logits(load: Load, classifier: Collection[str]) -> None:
    """Raises CheckpointError for a classifier behind a layer that timm no longer has, and drops: its logits would be wrong."""
    behind = [key for key in load.given if "pre_logits" in key]
    if behind and any(key in load.loaded for key in classifier):
        raise CheckpointError(PRE_LOGITS.format(behind[0]))


def misfit(load: Load, missing: list[str], strange: list[str]) -> str:
    """Returns what does not fit, in one line."""
    parts = []
    if missing:
        parts.append(f"it has no {listed(missing)}")
    if strange:
        parts.append(f"the model has no {listed(strange)}")
    hint = ""
    if "norm.weight" in missing and any(key.startswith("fc_norm.") for key in strange):
        hint = "; the weights were fine-tuned with pooled tokens: set model.global_pool=avg"
    elif "fc_norm.weight" in missing and "norm.weight" in load.filtered:
        hint = "; the weights were trained with a class token: set model.global_pool=token"
    return " and ".join(parts) + hint


def resampled(load: Load, model: nn.Module) -> Iterator[str]:
    """Yields 'pos_embed 37x37 -> 16x16' for each tensor that timm adapted to the model's sizes; a kind of tensors once."""
    seen = set()
    for name, shape in load.loaded.items():
        before = load.given.get(name)
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        if before is None or before == shape or len(before) != len(shape) or kind in seen:
            continue
        seen.add(kind)
        if name == "pos_embed" and grid(before) == grid(shape):
            continue  # only the class token's position went elsewhere
        if name == "pos_embed":
            yield f"{name} {grid(before)} -> {grid(shape)}"
        elif len(shape) == 4 and before[1] != shape[1]:
            yield f"{name} {before[1]} -> {shape[1]} channels"
        elif len(shape) == 4:
            yield f"{name} {before[2]}x{before[3]} -> {shape[2]}x{shape[3]}"
        else:
            yield f"{kind} {tuple(before)} -> {tuple(shape)}"


def grid(shape: tuple[int, ...]) -> str:
    """Returns '16x16' for position embeddings (1, 257, C) or (1, 256, C); the number of tokens where they are no square."""
    if len(shape) == 4:
        return f"{shape[1]}x{shape[2]}"
    tokens = shape[1]
    side = math.isqrt(tokens)
    prefix = tokens - side * side
    return f"{side}x{side}" if prefix <= 5 else f"{tokens} tokens"


def create_model(name: str, size: tuple[int, int] | None = None, **arguments: Any) -> tuple[nn.Module, Load | None]:
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
