"""Activation-aware conversion: run calibration images through the dense model, convert each layer for the tokens it sees.

Two passes over the images, of which only sums are kept: from the first, ``Moments``, follow each layer's bases; from the second,
moments of the converted layer's features and of the host's outputs, follows its linear read-out by regression, which also
corrects what the new scores get wrong. No labels are needed.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.attention.base import Calibration
from vit_tucker.attention.module import AttentionModule
from vit_tucker.attention.moments import LayerCall, Moments, MomentSums
from vit_tucker.errors import PatchError
from vit_tucker.patching.hosts import Host
from vit_tucker.patching.refine import refine
from vit_tucker.tensor.metric import metric_root
from vit_tucker.tensor.regression import LinearMoments

MOMENT_BYTES = 4 * 2**30
"""Layers are worked off in groups whose moments fit into this; each group costs two passes."""
EXACT = 1e-10
"""Relative squared output error below which a conversion counts as exact and its read-out is left alone."""


@dataclass
class CalibratedLayer:
    """A layer on its way through the calibration.

    Attributes:
        name: full module name.
        module: the host's module, in the model.
        host: read from it.
        replacement: the module to convert.
        seconds: time spent on it, passes through the model apart.
        output_error: ||y^ - y|| / ||y - mean y|| over the calibration tokens.
    """

    name: str
    module: nn.Module
    host: Host
    replacement: AttentionModule
    seconds: float = 0.0
    output_error: float = float("nan")


def calibrate(model: nn.Module, layers: list[CalibratedLayer], options: Calibration, batches: Iterable[Any]) -> None:
    """Convert the layers' replacements; fills in their seconds and output errors. The model is not changed.

    Args:
        model: dense, on its device.
        layers: distinct modules of the model.
        options: images, objective, damping, refinement.
        batches: image tensors (B, channels, height, width) as the model takes them, or tuples that start with one.

    Raises:
        PatchError: no images, bad images, too few tokens, constant tokens, values that are not finite.
    """
    images = collect_images(model, batches, options.images)
    with evaluating(model):
        for group in memory_groups(layers):
            sums = {layer.name: MomentSums(layer.host.spec, layer.host.weights) for layer in group}
            weights: dict[str, list[Tensor]] = {layer.name: [] for layer in group}

            def see(layer: CalibratedLayer, call: LayerCall, sums: Any = sums, weights: Any = weights) -> None:
                weights[layer.name].append(call.token_weights().float())
                with timed(layer):
                    sums[layer.name].add(call)

            run_with_probes(model, group, images, options, see)
            metrics = {layer.name: convert(layer, sums.pop(layer.name), options.damping) for layer in group}
            fit_readouts(model, group, images, weights, metrics, options.damping)
            for layer in group if options.refine_steps else []:
                with timed(layer):
                    refine_layer(model, layer, images, weights[layer.name], metrics[layer.name], options)
        measure(model, layers, images)


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
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, every module's own mode restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def timed(layer: CalibratedLayer) -> Iterator[None]:
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


def memory_groups(layers: list[CalibratedLayer]) -> Iterator[list[CalibratedLayer]]:
    """The layers in order, in groups whose moments fit into MOMENT_BYTES (a single layer always does)."""
    group: list[CalibratedLayer] = []
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


See = Callable[[CalibratedLayer, Tensor, dict[str, Any], Tensor], None]


@contextmanager
def watching(layers: Iterable[CalibratedLayer], see: See) -> Iterator[None]:
    """Calls ``see(layer, x, options, y)`` at each call of each layer's dense module."""

    def hook(layer: CalibratedLayer) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            given = {**dict(zip(("x", "attn_mask", "is_causal"), args, strict=False)), **kwargs}
            options = {name: given[name] for name in ("attn_mask", "is_causal") if given.get(name) is not None}
            see(layer, given["x"], options, output)

        return seen

    handles = [layer.module.register_forward_hook(hook(layer), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_with_probes(
    model: nn.Module,
    layers: list[CalibratedLayer],
    images: list[Tensor],
    options: Calibration,
    see: Callable[[CalibratedLayer, LayerCall], None],
) -> None:
    """Show each layer's calls with their probes to ``see``: gradients of random combinations of the features, or noise."""
    generator = torch.Generator().manual_seed(options.seed)
    backward = options.objective == "features"

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    for batch in images:
        calls: list[tuple[CalibratedLayer, Tensor, dict[str, Any], Tensor]] = []

        def note(layer: CalibratedLayer, x: Tensor, given: dict[str, Any], y: Tensor, calls: Any = calls) -> None:
            if backward and not y.requires_grad:
                y.requires_grad_(True)
            calls.append((layer, x.detach(), given, y))

        with torch.set_grad_enabled(backward), watching(layers, note):
            features = final_features(model, batch)
        outputs = [y for *_, y in calls]
        if backward:
            target = (features.float() * noise(features.float())).sum()
            grads = torch.autograd.grad(target, outputs, allow_unused=True)
            probes = [torch.zeros_like(y) if g is None else g for g, y in zip(grads, outputs, strict=True)]
        else:
            probes = [noise(y) for y in outputs]
        with torch.no_grad():
            for (layer, x, given, y), probe in zip(calls, probes, strict=True):
                see(layer, LayerCall(x, y.detach(), probe, **given))


def final_features(model: Any, images: Tensor) -> Tensor:
    """The model's features before its head (timm's forward_features), else its output."""
    forward = getattr(model, "forward_features", model)
    features = forward(images)
    while isinstance(features, tuple | list):
        features = features[0]
    if isinstance(features, Mapping):
        features = next(value for value in features.values() if isinstance(value, Tensor))
    return features


@dataclass(frozen=True)
class Metrics:
    """What is kept of a layer's moments after its conversion: second moments of tokens (C, C) and of probes (O, O)."""

    tokens: Tensor
    output: Tensor


def convert(layer: CalibratedLayer, sums: MomentSums, damping: float) -> Metrics:
    """Convert one layer from its moments.

    Raises:
        PatchError: too few tokens, or moments that are constant or not finite.
    """
    with timed(layer), located(layer.name), torch.no_grad():
        moments = sums.moments()
        widths = [linear.out_features for linear in layer.replacement.input_projections()]
        needed = min(layer.host.spec.embed_dim, max(widths, default=1))
        if moments.tokens < needed:
            raise ValueError(f"{moments.tokens} tokens are too few for rank {needed}; give more images")
        layer.replacement.convert_calibrated(layer.host.weights.double(), moments, damping)
    return Metrics(moments.query[:-1, :-1], moments.output)


@torch.no_grad()
def fit_readouts(
    model: nn.Module,
    layers: list[CalibratedLayer],
    images: list[Tensor],
    weights: Mapping[str, list[Tensor]],
    metrics: Mapping[str, Metrics],
    damping: float,
) -> None:
    """Second pass: fit each replacement's read-out to the host's outputs on the host's inputs; an exact one is left alone."""
    sums: dict[str, LinearMoments] = {}
    errors = {layer.name: ErrorSums() for layer in layers}
    remaining = {name: iter(values) for name, values in weights.items()}

    def see(layer: CalibratedLayer, x: Tensor, given: dict[str, Any], y: Tensor) -> None:
        with timed(layer):
            mixed = layer.replacement.mix(x, **given)
            errors[layer.name].add(layer.replacement.readout(mixed), y)
            f, targets = at_least_float32(mixed).flatten(0, -2), at_least_float32(y).flatten(0, -2)
            if layer.name not in sums:
                sums[layer.name] = LinearMoments.like(f, targets, centre=layer.replacement.has_out_bias)
            sums[layer.name].add(f, targets, next(remaining[layer.name]).flatten().to(f.dtype))

    with in_eval_mode(layers), watching(layers, see):
        for batch in images:
            final_features(model, batch)
    for layer in layers:
        if errors[layer.name].relative() ** 2 > EXACT:
            with timed(layer), located(layer.name):
                root = metric_root(metrics[layer.name].output, damping)
                layer.replacement.fit_readout(sums[layer.name], root, damping)


@torch.no_grad()
def refine_layer(
    model: nn.Module,
    layer: CalibratedLayer,
    images: list[Tensor],
    weights: list[Tensor],
    metrics: Metrics,
    options: Calibration,
) -> None:
    """Refine one converted layer on its calls; these are kept in memory while it lasts."""
    calls: list[LayerCall] = []
    remaining = iter(weights)

    def see(layer: CalibratedLayer, x: Tensor, given: dict[str, Any], y: Tensor) -> None:
        probe = next(remaining).unsqueeze(-1)  # only its norm is needed from here on
        calls.append(LayerCall(x, y, probe, **given))

    with watching([layer], see):
        for batch in images:
            final_features(model, batch)
    with in_eval_mode([layer]), located(layer.name):
        roots = metric_root(metrics.tokens, options.damping), metric_root(metrics.output, options.damping)
        refine(layer.replacement, calls, *roots, steps=options.refine_steps, lr=options.refine_lr, seed=options.seed)


@torch.no_grad()
def measure(model: nn.Module, layers: list[CalibratedLayer], images: list[Tensor]) -> None:
    """Fill in each layer's output error, on the tokens of the dense model."""
    errors = {layer.name: ErrorSums() for layer in layers}

    def see(layer: CalibratedLayer, x: Tensor, given: dict[str, Any], y: Tensor) -> None:
        errors[layer.name].add(layer.replacement(x, **given), y)

    with in_eval_mode(layers), watching(layers, see):
        for batch in images:
            final_features(model, batch)
    for layer in layers:
        layer.output_error = errors[layer.name].relative()


@dataclass
class ErrorSums:
    """Running sums for ||y^ - y|| / ||y - mean y||."""

    squares: float = 0.0
    total: float = 0.0
    count: int = 0
    mean_sum: Tensor | None = None

    def add(self, output: Tensor, y: Tensor) -> None:
        """Add outputs and targets, both (..., O)."""
        y = y.double().flatten(0, -2)
        self.squares += (output.double().flatten(0, -2) - y).square().sum().item()
        self.total += y.square().sum().item()
        self.count += len(y)
        self.mean_sum = y.sum(0) if self.mean_sum is None else self.mean_sum + y.sum(0)

    def relative(self) -> float:
        """The error; of a constant y against its norm."""
        if self.mean_sum is None:
            return 0.0
        variance = self.total - self.mean_sum.square().sum().item() / self.count
        return (self.squares / max(variance, 1e-12 * self.total, 1e-300)) ** 0.5


@contextmanager
def in_eval_mode(layers: Iterable[CalibratedLayer]) -> Iterator[None]:
    """The replacements in eval mode for a while."""
    modes = [(module, module.training) for layer in layers for module in layer.replacement.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def at_least_float32(x: Tensor) -> Tensor:
    """float64 stays, anything narrower becomes float32."""
    return x if x.dtype == torch.float64 else x.float()
