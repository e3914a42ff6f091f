"""Watches attention layers at work: what goes in, what comes out, and what an error there would cost."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vit_tucker.attention.call import Call, to_sequences
from vit_tucker.attention.moments import LayerCall, Moments
from vit_tucker.attention.options import Calibration
from vit_tucker.errors import PatchError
from vit_tucker.hosts.families import family_of
from vit_tucker.hosts.readers import Host
from vit_tucker.show.progress_bars import progress_bar

MOMENT_BYTES = 4 * 2**30
"""Layers are worked off in groups whose moments fit into this; each group costs its own passes over the images."""


@dataclass
class WatchedLayer:
    """A dense attention layer of a model.

    Attributes:
        name: full module name.
        module: the host's module, in the model.
        host: read from it.
        seconds: time spent on it, passes through the model apart.
        images, tokens: how many its moments come from.
    """

    name: str
    module: nn.Module
    host: Host
    seconds: float = 0.0
    images: int = 0
    tokens: int = 0


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


def layers_per_pass(layers: list[Layer]) -> Iterator[list[Layer]]:
    """Yields the layers in order, in groups whose moments fit into MOMENT_BYTES (a single layer always does)."""
    return groups_within(layers, lambda layer: Moments.bytes(layer.host.spec), MOMENT_BYTES)


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
def watching(layers: Iterable[Layer], see: Callable[[Layer, Call, Tensor], None]) -> Iterator[None]:
    """Calls ``see(layer, call, y)`` at each call of each layer's dense module, before its own hooks; y in the host's layout."""

    def hook(layer: Layer) -> Callable[..., None]:
        family = family_of(layer.module)
        assert family is not None

        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            see(layer, family.read_call(module, layer.host.spec, args, kwargs), first(output))

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


def show_calls(
    model: nn.Module,
    layers: Iterable[Layer],
    images: list[Tensor],
    see: Callable[[Layer, Call, Tensor], None],
    what: str,
) -> None:
    """Runs the images through the model and shows each layer's calls to ``see``.

    Args:
        model: in eval mode.
        layers: of the model.
        images: (B, channels, height, width) batches.
        see: called as in ``watching``.
        what: the progress bar is for.
    """
    with watching(layers, see):
        for batch in progress_bar(images, what=what, unit="batches"):
            final_features(model, batch)


def detached(call: Call) -> Call:
    """Returns the call without the graph that made it."""
    mask, rope = (None if value is None else value.detach() for value in (call.attn_mask, call.rope))
    return call._replace(x=call.x.detach(), attn_mask=mask, rope=rope)


def run_with_probes(
    model: nn.Module,
    layers: list[Layer],
    images: list[Tensor],
    options: Calibration,
    see: Callable[[Layer, LayerCall], None],
) -> None:
    """Shows each layer's calls with their probes to ``see``: gradients of random combinations of the features, or noise.

    Args:
        model, layers, images: as of ``show_calls``, images (B, channels, height, width).
        options: objective and seed.
        see: called with each layer and its call.

    Raises:
        PatchError: no gradients, where the objective needs them.
    """
    generator = torch.Generator().manual_seed(options.seed)
    backward = options.objective == "features"
    if backward and any(tensor.is_inference() for tensor in chain(model.parameters(), model.buffers())):
        raise PatchError(
            "calibration: the model's weights are inference tensors, which have no gradients: make the model outside of "
            "torch.inference_mode, or calibrate with objective='layer'"
        )

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    for batch in progress_bar(images, what=f"moments of {len(layers)} layers", unit="batches"):
        calls: list[tuple[Layer, Call, Tensor]] = []

        def note(layer: Layer, call: Call, y: Tensor, calls: Any = calls) -> None:
            if backward and not y.requires_grad:
                y.requires_grad_(True)
            calls.append((layer, detached(call), y))

        with torch.set_grad_enabled(backward), watching(layers, note):
            features = final_features(model, batch)
            target = random_combination(features, noise) if backward else None
        outputs = [y for *_, y in calls]
        if target is not None:
            grads = torch.autograd.grad(target, outputs, allow_unused=True)
            probes = [torch.zeros_like(y) if g is None else g for g, y in zip(grads, outputs, strict=True)]
        else:
            probes = [noise(y) for y in outputs]
        with torch.no_grad():
            for (layer, call, y), probe in zip(calls, probes, strict=True):
                layout = layer.host.spec.layout
                see(layer, LayerCall(call.x, to_sequences(y.detach(), layout), to_sequences(probe, layout), *call[1:4]))


def random_combination(features: list[Tensor], noise: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns a scalar whose gradient is random in the space of the features.

    Args:
        features: (B, ...) of any shapes.
        noise: returns random numbers of a tensor's shape.

    Raises:
        PatchError: no feature has gradients.
    """
    parts = [part.float() for part in features if part.requires_grad]
    if not parts:
        raise PatchError(
            "calibration: the model's features have no gradients: does its forward turn them off? Or calibrate with "
            "objective='layer', which needs none"
        )
    return torch.stack([(part * noise(part)).sum() for part in parts]).sum()


def final_features(model: Any, images: Tensor) -> list[Tensor]:
    """Returns the features before the head (timm's forward_features), else the outputs: all maps of a model of features."""
    forward = getattr(model, "forward_features", model)
    parts = tree_leaves(forward(images))
    return [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
