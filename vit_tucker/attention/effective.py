"""The weights that modules compute with, whatever stands around them: adapters of PEFT, parametrizations, hooks.

Every reader of weights goes through here. A plain module is given back as it is; what can be merged exactly is merged in a copy;
anything else is refused, since its weights would not be what it computes with.
"""

import copy
import sys
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vit_tucker.attention.parametrized import FUNCTIONAL, free_copy, functional_hooks, without_parametrizations
from vit_tucker.errors import WeightsError, one_line

Layer = TypeVar("Layer", bound=nn.Module)
PROJECTIONS = (nn.Linear, nn.Conv2d)
CAPTURE = "transformers.utils.output_capturing"
"""Where the hooks are from by which transformers records outputs; it sets them up once for a model, at its first call."""
CONV1D = ("transformers.pytorch_utils", "Conv1D")
"""GPT-2's projection, a Linear whose weight is (in, out)."""
SILENT = (nn.Dropout, nn.Softmax, nn.Identity)
"""Classes of parts that hold no weights: their hooks can't change any, and go with the module."""
CALL_HOOKS = {"_forward_pre_hooks": "forward pre-hook", "_forward_hooks": "forward hook"}
"""Attributes of a module with hooks that may change what it computes."""
HOOKS = {**CALL_HOOKS, "_backward_pre_hooks": "backward pre-hook", "_backward_hooks": "backward hook"}
"""Attributes of a module with hooks of users."""
TOLERANCE = 1e-9
"""Largest relative difference, in float64, between an adapted module and what its adapters were merged into."""


def full_name(module: nn.Module) -> str:
    """Returns module and name of a module's class: 'peft.tuners.lora.layer.Linear'."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def imported_class(place: str, name: str) -> tuple[type, ...]:
    """Returns a class of another library for ``isinstance``; none unless that is imported: else there are no such modules."""
    found = getattr(sys.modules.get(place), name, None)
    return (found,) if isinstance(found, type) else ()


def is_tuner(module: nn.Module) -> bool:
    """Returns whether a module is one of PEFT's layers with adapters around another."""
    return isinstance(module, imported_class("peft.tuners.tuners_utils", "BaseTunerLayer"))


def is_adapter(module: nn.Module) -> bool:
    """Returns whether a module is one of PEFT's around another: a layer with adapters, or a trained copy."""
    return is_tuner(module) or isinstance(module, imported_class("peft.utils.other", "AuxiliaryTrainingWrapper"))


def records_outputs(hook: Any) -> bool:
    """Returns whether a hook is one of transformers, by which it records outputs; it changes none."""
    return getattr(hook, "__module__", "") == CAPTURE


def user_hooks(module: nn.Module, kinds: Collection[str] = tuple(HOOKS)) -> Iterator[str]:
    """Yields the kind of each hook on the module itself, those of torch and transformers apart."""
    for kind in kinds:
        for hook in getattr(module, kind).values():
            if not isinstance(hook, FUNCTIONAL) and not records_outputs(hook):
                yield HOOKS[kind]


def refuse_altered(module: nn.Module) -> None:
    """Raises WeightsError for a module with hooks that may change its output, or with another forward than its class."""
    for kind in user_hooks(module, tuple(CALL_HOOKS)):
        raise WeightsError(f"has a {kind}, which may change what it computes: remove it first (handle.remove())")
    if "forward" in vars(module):
        raise WeightsError(
            f"has a forward of its own in place of that of {full_name(module)}: its weights alone don't determine its output"
        )


def plain_part(part: nn.Module) -> nn.Module:
    """Returns the module itself if it is plain, else one that computes the same, with adapters and parametrizations merged.

    Args:
        part: a projection, norm or gate, or what a user put around one. It is not changed, and no hooks of it are called.

    Raises:
        WeightsError: it computes something else than its weights say; the message lacks its name.
    """
    refuse_altered(part)
    if is_adapter(part):
        return plain_part(merged(part))
    if parametrize.is_parametrized(part) or functional_hooks(part):
        return plain_part(without_parametrizations(part))
    return with_plain_parts(part)


def with_plain_parts(module: nn.Module, projections: Collection[str] = ()) -> nn.Module:
    """Returns the module itself if all of its parts are plain, else a shallow copy whose parts are.

    Args:
        module: it is not changed.
        projections: names of parts whose weights are to be read: Linears or convolutions.

    Raises:
        WeightsError: see ``plain_part``; the message names the part.
    """
    parts: dict[str, nn.Module | None] = {}
    for name, part in module._modules.items():
        try:
            parts[name] = part if part is None else plain_child(part, name in projections)
        except WeightsError as error:
            inside = str(error).removeprefix("its ")
            raise WeightsError(f"its {name}{' ' if inside == str(error) else '.'}{inside}") from None
    if all(parts[name] is part for name, part in module._modules.items()):
        return module
    new = copy.copy(module)
    new._modules = parts
    return without_hooks(new)


def readable(part: nn.Module) -> Any:
    """Returns a Linear or convolution, plain, whose ``weight`` and ``bias`` are what it computes with; see ``plain_part``.

    Raises:
        WeightsError: there is none.
    """
    plain = plain_part(part)
    refuse_unreadable(plain)
    return plain


def plain_layer(layer: Layer) -> Layer:
    """Returns a layer of ours whose own weights are what it computes with: itself, or a copy with adapters and the like merged.

    Raises:
        WeightsError: see ``with_plain_parts``.
    """
    if "forward" in vars(layer):
        refuse_altered(layer)
    linears = [name for name, part in layer.named_children() if hasattr(part, "in_features")]
    return cast(Layer, with_plain_parts(layer, linears))


def trains(module: nn.Module) -> bool:
    """Returns whether any parameter of a module is trained, such as those of its adapters.

    Its replacement is trained as a whole then.
    """
    return any(parameter.requires_grad for parameter in module.parameters())


def plain_child(part: nn.Module, is_projection: bool) -> nn.Module:
    """Returns a part of a module, plain; see ``with_plain_parts``."""
    if type(part) in SILENT:
        if "forward" in vars(part):
            refuse_altered(part)
        return part
    plain: nn.Module = readable(part) if is_projection else plain_part(part)
    if any(user_hooks(plain)):  # of gradients: they stay where they are
        return without_hooks(copy.copy(plain))
    return plain


def without_hooks(module: nn.Module) -> nn.Module:
    """Frees the module, which must be a copy, from the hooks that it shares with the one it was copied from."""
    for kind in HOOKS:
        setattr(module, kind, OrderedDict())
    return module


def refuse_unreadable(part: nn.Module) -> None:
    """Raises WeightsError for anything but a Linear or a convolution with weights of its own."""
    known: tuple[Any, ...] = (*PROJECTIONS, *imported_class(*CONV1D))
    cls = next((cls for cls in known if type(part).forward is cls.forward), None)
    if cls is None or type(part).__call__ is not nn.Module.__call__:
        raise WeightsError(f"is a {full_name(part)}, not a Linear or a convolution that its weights alone determine")
    for tensor in part.parameters():
        if is_traceable_wrapper_subclass(tensor) or is_traceable_wrapper_subclass(tensor.data):
            raise WeightsError(
                f"has weights that are a {type(tensor).__name__}, not a plain tensor: quantised or sharded"
            )


def merged(layer: Any) -> nn.Module:
    """Merges what a module of PEFT computes at present into one module of the kind that it is around.

    PEFT's own layers merge themselves, in float64; adapters that are switched off don't count. The result is compared with the
    adapted module on random inputs.

    Raises:
        WeightsError: its adapters can't be merged.
    """
    if not is_tuner(layer):
        return trained_copy(layer)
    for part in layer.modules():
        refuse_altered(part)
    base = layer.base_layer
    if not isinstance(base, nn.Module):
        raise WeightsError(f"is a {full_name(layer)}, which can't be merged")
    dtype = next((p.dtype for p in base.parameters()), torch.float32)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            new: Any = free_copy(layer).double().eval()
            x = inputs_of(plain_part(base))
            expected = None if x is None else new(x)
            if new.disable_adapters and new.merged:
                new.unmerge()
            elif not new.disable_adapters and not new.merged:
                new.merge()
            plain = plain_part(new.base_layer)
            got = None if x is None else plain(x)
    except WeightsError:
        raise
    except Exception as error:  # adapters of many kinds: each has its own words for what it can't merge
        raise WeightsError(f"is a {full_name(layer)}, which can't be merged: {one_line(error, 150)}") from None
    if (
        got is not None
        and expected is not None
        and (got - expected).abs().max() > TOLERANCE * (1 + expected.abs().max())
    ):
        raise WeightsError(f"is a {full_name(layer)}, whose merged weights don't compute what it computes")
    return plain.to(dtype)


def trained_copy(wrapper: Any) -> nn.Module:
    """Returns the module that PEFT's ``modules_to_save`` trains in place of another; raises WeightsError for other wrappers."""
    copies = getattr(wrapper, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        raise WeightsError(f"is a {full_name(wrapper)}, which can't be merged")
    active = [name for name in wrapper.active_adapters if name in copies]
    chosen: nn.Module = wrapper.original_module if wrapper.disable_adapters or not active else copies[active[0]]
    return chosen


def inputs_of(part: nn.Module) -> Tensor | None:
    """Draws random inputs of a Linear, convolution or norm, float64, from a generator of its own; None without values."""
    like = getattr(part, "weight", None)
    if not isinstance(like, Tensor) or like.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    width = like.shape[0] if isinstance(part, imported_class(*CONV1D)) else like.shape[-1]
    shape = (8, part.in_channels, *part.kernel_size) if isinstance(part, nn.Conv2d) else (8, width)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like.device)
