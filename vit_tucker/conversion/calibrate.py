"""Activation-aware conversion: run calibration images through the dense model, convert each layer for the tokens it sees.

Two passes over the images, of which only sums are kept: from the first, ``Moments``, follow each layer's bases; from the second,
moments of the converted layer's features and of the host's outputs, follows its linear read-out by regression, which also
corrects what the new scores get wrong. No labels are needed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.attention.call import Call, to_sequences
from vit_tucker.attention.module import AttentionModule
from vit_tucker.attention.moments import LayerCall, Moments, MomentSums
from vit_tucker.attention.options import Calibration
from vit_tucker.conversion.error_sums import ErrorSums
from vit_tucker.conversion.fit_readout import HeldOut, fit_readout
from vit_tucker.conversion.images import collect_images
from vit_tucker.conversion.observe import (
    Layer,
    WatchedLayer,
    evaluating,
    layers_per_pass,
    located,
    run_with_probes,
    show_calls,
    timed,
)
from vit_tucker.conversion.refine import refine
from vit_tucker.show.progress_bars import each, progress_bar, showing_progress
from vit_tucker.tensor.metric import metric_root

EXACT = 1e-10
"""Relative squared output error below which a conversion counts as exact and its read-out is left alone."""


@dataclass
class CalibratedLayer(WatchedLayer):
    """A layer on its way through the calibration.

    Attributes:
        replacement: the module to convert.
        output_error: ||y^ - y|| / ||y - mean y|| over the calibration tokens.
    """

    replacement: AttentionModule = field(kw_only=True)
    output_error: float = float("nan")


def calibrate(model: nn.Module, layers: list[CalibratedLayer], options: Calibration, batches: Iterable[Any]) -> None:
    """Converts the layers' replacements, and fills in their seconds and output errors. The model is not changed.

    Args:
        model: dense, on its device.
        layers: distinct modules of the model.
        options: images, objective, damping, refinement.
        batches: image tensors (B, channels, height, width) as the model takes them, or tuples that start with one.

    Raises:
        PatchError: no images, images that the model does not take, weights without gradients, too few tokens, constant tokens,
            values that are not finite.
    """
    images = collect_images(model, batches, options.images)
    with evaluating(model):
        for group in layers_per_pass(layers):
            sums, weights = sum_moments(model, group, images, options)
            metrics = {}
            for layer in each(group, "converting", "layers"):
                metrics[layer.name] = convert_layer(layer, sums.pop(layer.name), options.damping)
            fit_readouts(model, group, images, weights, metrics, options.damping)
            steps = len(group) * options.refine_steps
            with showing_progress(None if steps else False), progress_bar(total=steps, unit="steps") as bar:
                for layer in group if steps else []:
                    bar.set_description(f"refining {layer.name}")
                    with timed(layer):
                        refine_layer(
                            model, layer, images, weights[layer.name], metrics[layer.name], options, bar.update
                        )
        measure(model, layers, images)


def sum_moments(
    model: nn.Module, layers: list[Layer], images: list[Tensor], options: Calibration
) -> tuple[dict[str, MomentSums], dict[str, list[Tensor]]]:
    """Sums each layer's moments over the images, the first pass; returns them and the token weights of its calls, by name.

    Args:
        model: in eval mode, its layers still dense.
        layers: whose moments are summed.
        images: (B, channels, height, width) batches, as ``collect_images`` returns them.
        options: the calibration's.
    """
    sums = {layer.name: MomentSums(layer.host.spec, layer.host.weights) for layer in layers}
    weights: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}

    def see(layer: Layer, call: LayerCall) -> None:
        weights[layer.name].append(call.token_weights().float())
        with timed(layer):
            sums[layer.name].add(call)

    run_with_probes(model, layers, images, options, see)
    for layer in layers:
        layer.images, layer.tokens = sum(map(len, images)), sums[layer.name].tokens
    return sums, weights


def collect_moments(
    model: nn.Module, layers: list[Layer], options: Calibration, batches: Iterable[Any], what: str
) -> Iterator[tuple[Layer, Moments]]:
    """Yields each layer with its moments, one after the other; arguments as of ``calibrate``, and so are the errors.

    ``what`` says in progress bars what is done with them: 'choosing ranks of'.
    """
    images = collect_images(model, batches, options.images)
    with evaluating(model):
        for group in layers_per_pass(layers):
            sums, _ = sum_moments(model, group, images, options)
            for layer in each(group, what, "layers"):
                with located(layer.name):
                    moments = sums.pop(layer.name).moments()
                yield layer, moments


@dataclass(frozen=True)
class KeptMoments:
    """The moments of a layer that are needed after its conversion: second moments of tokens (C, C) and of probes (O, O)."""

    tokens: Tensor
    output: Tensor


def convert_layer(layer: CalibratedLayer, sums: MomentSums, damping: float) -> KeptMoments:
    """Converts one layer from its moments.

    Args:
        layer: its replacement is changed in place.
        sums: of the layer's moments.
        damping: see ``Calibration.damping``.

    Raises:
        PatchError: too few tokens (a ValueError that ``located`` names), or moments that are constant or not finite.
    """
    with timed(layer), located(layer.name), torch.no_grad():
        moments = sums.moments()
        widths = [linear.out_features for linear in layer.replacement.input_projections()]
        needed = min(layer.host.spec.embed_dim, max(widths, default=1))
        if moments.tokens < needed:
            raise ValueError(f"{moments.tokens} tokens are too few for rank {needed}; give more images")
        layer.replacement.convert_calibrated(layer.host.weights.double(), moments, damping)
    return KeptMoments(moments.query[:-1, :-1], moments.output)


@torch.no_grad()
def fit_readouts(
    model: nn.Module,
    layers: list[CalibratedLayer],
    images: list[Tensor],
    weights: Mapping[str, list[Tensor]],
    metrics: Mapping[str, KeptMoments],
    damping: float,
) -> None:
    """Fits each replacement's read-out to the host's outputs on its inputs, the second pass; an exact one is left alone.

    Args:
        model, layers, images: as of ``sum_moments`` (images (B, channels, height, width)); the layers are converted, and changed.
        weights: token weights (B, N) of each layer's calls in order, by layer name.
        metrics, damping: moments by layer name, and ``Calibration.damping``.
    """
    sums: dict[str, HeldOut] = {}
    errors = {layer.name: ErrorSums() for layer in layers}
    remaining = {name: iter(values) for name, values in weights.items()}

    def see(layer: CalibratedLayer, call: Call, y: Tensor) -> None:
        with timed(layer):
            y = to_sequences(y, layer.host.spec.layout)
            mixed = layer.replacement.mix(*call[:4])
            errors[layer.name].add(layer.replacement.readout(mixed), y)
            if layer.name not in sums:
                sums[layer.name] = HeldOut.like(mixed, y, centre=layer.replacement.has_out_bias)
            sums[layer.name].add(mixed, y, next(remaining[layer.name]))

    with evaluating(*(layer.replacement for layer in layers)):
        show_calls(model, layers, images, see, f"features of {len(layers)} layers")
    for layer in each(layers, "fitting", "layers"):
        if errors[layer.name].relative() ** 2 > EXACT:
            with timed(layer), located(layer.name), evaluating(layer.replacement):
                root = metric_root(metrics[layer.name].output, damping)
                fit_readout(layer.replacement, sums.pop(layer.name), root, damping)


@torch.no_grad()
def refine_layer(
    model: nn.Module,
    layer: CalibratedLayer,
    images: list[Tensor],
    weights: list[Tensor],
    metrics: KeptMoments,
    options: Calibration,
    after_step: Callable[[], object],
) -> None:
    """Refines one converted layer on its calls, which are kept in memory meanwhile.

    Args:
        model, images, options: as of ``sum_moments``, images (B, channels, height, width).
        layer: converted; its replacement is changed in place.
        weights, metrics: token weights (B, N) of the layer's calls in order, and its moments.
        after_step: called after each step.
    """
    calls: list[LayerCall] = []
    remaining = iter(weights)

    def see(layer: CalibratedLayer, call: Call, y: Tensor) -> None:
        probe = next(remaining).unsqueeze(-1)  # only its norm is needed from here on
        calls.append(LayerCall(call.x, to_sequences(y, layer.host.spec.layout), probe, *call[1:4]))

    show_calls(model, [layer], images, see, f"calls of {layer.name}")
    with evaluating(layer.replacement), located(layer.name):
        roots = metric_root(metrics.tokens, options.damping), metric_root(metrics.output, options.damping)
        steps, lr, seed = options.refine_steps, options.refine_lr, options.seed
        refine(layer.replacement, calls, *roots, steps=steps, lr=lr, seed=seed, after_step=after_step)


@torch.no_grad()
def measure(model: nn.Module, layers: list[CalibratedLayer], images: list[Tensor]) -> None:
    """Sets each layer's relative output error, on the tokens of the dense model; arguments as of ``sum_moments``."""
    errors = {layer.name: ErrorSums() for layer in layers}

    def see(layer: CalibratedLayer, call: Call, y: Tensor) -> None:
        errors[layer.name].add(layer.replacement.run(call), to_sequences(y, layer.host.spec.layout))

    with evaluating(*(layer.replacement for layer in layers)):
        show_calls(model, layers, images, see, "output errors")
    for layer in layers:
        layer.output_error = errors[layer.name].relative()
