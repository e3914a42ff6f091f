"""Watches attention layers at work: what goes in, and what comes out."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vit_tucker.attention.call import Call, from_sequences
from vit_tucker.attention.module import AttentionModule
from vit_tucker.errors import PatchError
from vit_tucker.hosts.families import family_of
from vit_tucker.hosts.readers import Host


@dataclass
class WatchedLayer:
    """A dense attention layer of a model.

    Attributes:
        name: full module name.
        module: the host's module, in the model.
        host: read from it.
        seconds: time spent on it, passes through the model apart.
        images, tokens: how many its moments come from: images or sequences, and their tokens.
    """

    name: str
    module: nn.Module
    host: Host
    seconds: float = 0.0
    images: int = 0
    tokens: int = 0


@dataclass
class CalibratedLayer(WatchedLayer):
    """A layer on its way through the calibration.

    Attributes:
        replacement: the module to convert.
        output_error: ||y^ - y|| / ||y - mean y|| over the calibration tokens.
    """

    replacement: AttentionModule = field(kw_only=True)
    output_error: float = float("nan")


Item = TypeVar("Item")
Layer = TypeVar("Layer", bound=WatchedLayer)


@contextmanager
def evaluating(*roots: nn.Module) -> Iterator[None]:
    """Puts modules into eval mode; every submodule's own mode is restored afterwards."""
    modes = {module: module.training for root in roots for module in root.modules()}
    for root in roots:
        root.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def timed(layer: WatchedLayer) -> Iterator[None]:
    """Adds the time spent inside to the layer's seconds."""
    start = time.perf_counter()
    yield
    layer.seconds += time.perf_counter() - start


@contextmanager
def located(name: str) -> Iterator[None]:
    """Turns numerical complaints into a PatchError that names the layer."""
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise PatchError(f"{name}: calibration: {error}") from None


def groups_within(items: Iterable[Item], size: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Yields the items in order, in groups whose sizes sum to ``limit`` at most; a single item may be larger.

    Args:
        items: of any kind.
        size: returns the size of an item.
        limit: in the same unit.
    """
    group: list[Item] = []
    used = 0
    for item in items:
        needed = size(item)
        if group and used + needed > limit:
            yield group
            group, used = [], 0
        group.append(item)
        used += needed
    if group:
        yield group


@contextmanager
def watching(layers: Iterable[Layer], see: Callable[[Layer, Call, Tensor], Tensor | None]) -> Iterator[None]:
    """Calls ``see(layer, call, y)`` at each call of each layer's dense module, before its own hooks.

    Args:
        layers: of a model.
        see: is given the output y in the host's layout; what it returns, (B, N, O), takes its place.
    """

    def hook(layer: Layer) -> Callable[..., Any]:
        family = family_of(layer.module)
        assert family is not None

        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            y = first(output)
            given = see(layer, family.read_call(module, layer.host.spec, args, kwargs), y)
            if given is None:
                return None
            given = from_sequences(given, y, layer.host.spec.layout)
            return given if isinstance(output, Tensor) else (given, *output[1:])

        return seen

    handles = [layer.module.register_forward_hook(hook(layer), prepend=True, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first(output: Any) -> Tensor:
    """Returns the output of an attention module, a tensor or the first of a tuple, which attention maps follow."""
    return output if isinstance(output, Tensor) else output[0]


def detached(call: Call) -> Call:
    """Returns the call without the graph that made it."""
    mask, rope = (None if value is None else value.detach() for value in (call.attn_mask, call.rope))
    return call._replace(x=call.x.detach(), attn_mask=mask, rope=rope)
