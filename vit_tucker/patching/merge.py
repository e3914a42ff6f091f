"""Merges a patched model into a plain timm model: equal dense weights in timm's own attention modules."""

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from vit_tucker.attention.effective import is_adapter, plain_part, readable, trains
from vit_tucker.attention.special_cases import HeadsForm, heads_form
from vit_tucker.errors import PatchError, naming, one_line
from vit_tucker.hosts import find
from vit_tucker.hosts.plain import plain_host
from vit_tucker.hosts.slot import ATTENTION, LINEAR
from vit_tucker.hosts.writers import write_layer, write_linear
from vit_tucker.patching.identity import mark
from vit_tucker.patching.record import patch_records, set_module, set_records, shared_records


@dataclass(frozen=True)
class MergedLayer:
    """The result of merging one layer.

    Attributes:
        name: full module name.
        layer: class name of the layer of ours.
        pre_error, post_error: of cutting its tensors to the heads' width, relative; 0: exact. See ``HeadsForm``.
    """

    name: str
    layer: str
    pre_error: float
    post_error: float

    @property
    def exact(self) -> bool:
        """Returns whether the merged layer computes what the replaced one did, with no rank cut."""
        return self.pre_error == self.post_error == 0


@dataclass(frozen=True)
class Merged:
    """A plain timm model with the attention of a patched one.

    Attributes:
        model: of timm's own classes; no layer of ours is left.
        layers: what became of each patched layer.
    """

    model: nn.Module
    layers: tuple[MergedLayer, ...]


def merge(model: nn.Module, host: nn.Module | None = None, *, approximate: bool = False) -> Merged:
    """Writes the attention of a patched model into modules of timm's; ``vit_tucker.dense_model`` makes hosts, too.

    Args:
        model: patched.
        host: to write copies of its modules; None for the modules that ``patch`` kept. Neither is changed.
        approximate: cut what does not fit to the nearest that does.

    Raises:
        PatchError: a layer has no dense form of the host's shape, or there is no host to write into.
    """
    model = find.inner(model)
    find.refuse_wrapped(model)
    layers: dict[str, Any] = ATTENTION.layers(model)
    forms: dict[str, HeadsForm] = {}
    for name, layer in layers.items():
        with naming(name):
            forms[name] = heads_form(layer, approximate)
    layers |= LINEAR.layers(model)
    modules: dict[int, nn.Module] = {}  # a layer that stands at several places gets one module
    for name, layer in layers.items():
        if id(layer) not in modules:
            modules[id(layer)] = _written(name, _host_module(model, host, name), layer, forms.get(name), model)
    result = _without_record(model)
    for name, layer in layers.items():
        set_module(result, name, modules[id(layer)])
    merge_adapters(result)
    rows = [
        MergedLayer(name, type(m).__name__, *(forms[name][1:] if name in forms else (0.0, 0.0)))
        for name, m in layers.items()
    ]
    return Merged(result, tuple(rows))


def merge_adapters(model: nn.Module) -> None:
    """Replaces a model's modules with adapters by plain modules, wherever they are, in place.

    Raises:
        PatchError: one can't be merged; names it.
    """
    adapters = [name for name, module in model.named_modules() if is_adapter(module)]
    for name in adapters:
        if any(name.startswith(f"{other}.") for other in adapters):
            continue
        try:
            plain = plain_part(model.get_submodule(name))
        except PatchError as error:
            raise PatchError(f"{name} {error}") from None
        set_module(model, name, plain)


def _host_module(model: nn.Module, host: nn.Module | None, name: str) -> nn.Module:
    """Returns the module of timm's that once stood there."""
    if host is not None:
        try:
            return host.get_submodule(name)
        except AttributeError:
            raise PatchError(f"{name}: {type(host).__name__} has no such module: it is not the model's host") from None
    originals = {k: m for record in patch_records(model).values() for k, m in (record.originals or {}).items()}
    if name not in originals:
        raise PatchError("the modules that were replaced were not kept: give the timm model they came from as host")
    return originals[name]


def _written(name: str, module: nn.Module, layer: Any, form: HeadsForm | None, model: nn.Module) -> nn.Module:
    """Returns a copy of the host's module that computes what the layer does."""
    like = next(layer.parameters())
    with naming(name):
        new = copy.deepcopy(readable(module) if form is None else plain_host(module)[0])
    if any(tensor.is_meta for tensor in (*new.parameters(), *new.buffers())):
        raise PatchError(f"{name}: the host is on the meta device, where its own tables have no values")
    new = new.to(like.device, like.dtype)
    try:
        if form is None:
            write_linear(new, layer)
        else:
            write_layer(new, layer, form.weights, model)
    except (PatchError, RuntimeError) as error:  # RuntimeError: shapes that differ
        raise PatchError(f"{name}: {one_line(error)}") from None
    return new.requires_grad_(trains(layer)).train(layer.training)


def _without_record(model: nn.Module) -> nn.Module:
    """Returns a copy without its patch record and the replaced modules."""
    result = copy.deepcopy(model, shared_records(model))
    for record in patch_records(model).values():
        mark(result, {}, record.identity)
    set_records(result, {})
    return result
