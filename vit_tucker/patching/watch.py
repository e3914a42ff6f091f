"""Watching attention layers at work: what goes in, what comes out, and what an error there would cost."""

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vit_tucker.attention.call import Call, read_call, to_sequences
from vit_tucker.attention.moments import LayerCall, Moments
from vit_tucker.attention.options import Calibration
from vit_tucker.errors import PatchError
from vit_tucker.patching.readers import Host

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
    """

    name: str
    module: nn.Module
    host: Host
    seconds: float = 0.0


Layer = TypeVar("Layer", bound=WatchedLayer)


def collect_images(model: nn.Module, batches: Iterable[Any], limit: int) -> list[Tensor]:
    """The first ``limit`` images, in batches, on the model's device and in its dtype.

    Raises:
        PatchError: nothing there, no image tensors, or values that are not finite.
    """
    like = next(p for p in model.parameters() if p.is_floating_point())
    images: list[Tensor] = []
    count = 0
    for number, batch in enumerate([batches] if isinstance(batches, Tensor) else batches):
        tensor = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(tensor, Tensor) or tensor.ndim != 4 or not tensor.is_floating_point():
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise PatchError(f"calibration: batch {number} is {shape}, not a float tensor (B, channels, height, width)")
        if not torch.isfinite(tensor).all():
            raise PatchError(f"calibration: batch {number} holds values that are not finite")
        images.append(tensor[: limit - count].to(like.device, like.dtype))
        count += len(images[-1])
        if count >= limit:
            break
    if count == 0:
        raise PatchError("calibration: no images")
    return images


@contextmanager
def evaluating(*roots: nn.Module) -> Iterator[None]:
    """The modules in eval mode, every submodule's own mode restored afterwards."""
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


def memory_groups(layers: list[Layer]) -> Iterator[list[Layer]]:
    """The layers in order, in groups whose moments fit into MOMENT_BYTES (a single layer always does)."""
    group: list[Layer] = []
    used = 0
    for layer in layers:
        needed = Moments.bytes(layer.host.spec)
        if group and used + needed > MOMENT_BYTES:
            yield group
            group, used = [], 0
        group.append(layer)
        used += needed
    if group:
        yield group


@contextmanager
def watching(layers: Iterable[Layer], see: Callable[[Layer, Call, Tensor], None]) -> Iterator[None]:
    """Calls ``see(layer, call, y)`` at each call of each layer's dense module, before its own hooks; y in the host's layout."""

    def hook(layer: Layer) -> Callable[..., None]:
        signature, spec = inspect.signature(layer.module.forward), layer.host.spec
        bias: Any = spec.extras.get("position_bias", {}).get("position_bias")

        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            see(layer, read_call(spec.layout, bias, **signature.bind(*args, **kwargs).arguments), output)

        return seen

    handles = [layer.module.register_forward_hook(hook(layer), prepend=True, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def detached(call: Call) -> Call:
    """The call without the graph that made it."""
    mask, rope = (None if value is None else value.detach() for value in (call.attn_mask, call.rope))
    return Call(call.x.detach(), mask, call.is_causal, rope)


def run_with_probes(
    model: nn.Module,
    layers: list[Layer],
    images: list[Tensor],
    options: Calibration,
    see: Callable[[Layer, LayerCall], None],
) -> None:
    """Show each layer's calls with their probes to ``see``: gradients of random combinations of the features, or noise."""
    generator = torch.Generator().manual_seed(options.seed)
    backward = options.objective == "features"

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    for batch in images:
        calls: list[tuple[Layer, Call, Tensor]] = []

        def note(layer: Layer, call: Call, y: Tensor, calls: Any = calls) -> None:
            if backward and not y.requires_grad:
                y.requires_grad_(True)
            calls.append((layer, detached(call), y))

        with torch.set_grad_enabled(backward), watching(layers, note):
            features = final_features(model, batch).float()
            target = (features * noise(features)).sum() if backward else None
        outputs = [y for *_, y in calls]
        if target is not None:
            grads = torch.autograd.grad(target, outputs, allow_unused=True)
            probes = [torch.zeros_like(y) if g is None else g for g, y in zip(grads, outputs, strict=True)]
        else:
            probes = [noise(y) for y in outputs]
        with torch.no_grad():
            for (layer, call, y), probe in zip(calls, probes, strict=True):
                layout = layer.host.spec.layout
                see(layer, LayerCall(call.x, to_sequences(y.detach(), layout), to_sequences(probe, layout), *call[1:]))


def final_features(model: Any, images: Tensor) -> Tensor:
    """The model's features before its head (timm's forward_features), else its output."""
    forward = getattr(model, "forward_features", model)
    features = forward(images)
    while isinstance(features, tuple | list):
        features = features[0]
    if isinstance(features, Mapping):
        features = next(value for value in features.values() if isinstance(value, Tensor))
    return features
