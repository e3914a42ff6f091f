"""Activation-aware conversion: run calibration inputs through the dense model, convert each layer for the tokens it sees.

One pass over the inputs keeps the calls of as many layers as fit into memory; then each layer is worked off by itself. From sums
over its calls, ``Moments``, follow its bases; from moments of the converted layer's features and of the host's outputs follows
its linear read-out by regression, which also corrects what the new scores get wrong. No labels are needed.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from vit_tucker.attention.call import Call
from vit_tucker.attention.moment_sums import MomentSums
from vit_tucker.attention.moments import MEANS, LayerCall, Moments, Needs
from vit_tucker.attention.options import Calibration
from vit_tucker.conversion.collect import collect_inputs
from vit_tucker.conversion.error_sums import ErrorSums
from vit_tucker.conversion.fit_readout import HeldOut, fit_readout
from vit_tucker.conversion.observe import CalibratedLayer, Layer, WatchedLayer, evaluating, located, timed
from vit_tucker.conversion.probes import layers_with_calls
from vit_tucker.conversion.refine import joined, refine
from vit_tucker.conversion.stream import BlockStream
from vit_tucker.show.progress_bars import progress_bar
from vit_tucker.tensor.metric import metric_root

Calls = Callable[[], Iterable[LayerCall]]
"""The calls of a layer, as often as they are asked for."""
EXACT = 1e-10
"""Relative squared output error below which a conversion counts as exact and its read-out is left alone."""


def calibrate(model: nn.Module, layers: list[CalibratedLayer], options: Calibration, batches: Iterable[Any]) -> None:
    """Converts the layers' replacements, and fills in their seconds and output errors. The model is not changed.

    Args:
        model: dense, on its device.
        layers: distinct modules of the model.
        options: images, objective, damping, refinement.
        batches: as of ``collect_inputs``.

    Raises:
        PatchError: no inputs, some that the model does not take, weights without gradients, too few tokens, constant tokens,
            values that are not finite.
    """
    inputs = collect_inputs(model, batches, options.images)
    with evaluating(model), progress_bar(total=len(layers), what="converting", unit="layers") as bar:
        stream = BlockStream(model, layers, inputs) if options.sequential else None
        for layer, calls in layers_with_calls(model, layers, inputs, options):
            bar.set_description(f"converting {layer.name}")
            layer.images = sum(map(len, inputs))
            with torch.no_grad(), evaluating(layer.replacement), timed(layer), located(layer.name):
                calibrate_layer(layer, calls, options, stream)
            bar.update()


def calibrate_layer(
    layer: CalibratedLayer, calls: Calls, options: Calibration, stream: BlockStream | None = None
) -> None:
    """Converts one layer, fits its read-out, refines it if asked to, and measures its error; called under no_grad.

    Args:
        layer: its replacement, in eval mode, is changed in place.
        calls: of its dense module.
        options: damping, refinement.
        stream: hands the layer what the layers before it, which are converted, make of the tokens; None: what the dense ones do.

    Raises:
        ValueError: too few tokens, or moments that are constant or not finite.
    """
    moments = convert_layer(layer, calls, options)
    output = metric_root(moments.output, options.damping)
    wanted = calls
    if stream is not None:
        wanted = partial(iter, stream.calls(layer, list(calls())))
    if relative_error(layer, wanted, least=EXACT**0.5) ** 2 > EXACT:
        fit_readout(layer.replacement, readout_sums(layer, wanted), output, options.damping)
    if options.refine_steps:
        tokens = metric_root(moments.query[:-1, :-1], options.damping)
        steps, lr, seed = options.refine_steps, options.refine_lr, options.seed
        with progress_bar(total=steps, what=f"refining {layer.name}", unit="steps") as bar:
            refine(
                layer.replacement,
                joined(wanted()),
                tokens,
                output,
                steps=steps,
                lr=lr,
                seed=seed,
                after_step=bar.update,
            )
    layer.replacement.orthonormalise()
    if stream is not None:
        stream.add(layer)
    layer.output_error = relative_error(layer, calls)


def sum_moments(layer: WatchedLayer, calls: Calls, needs: Needs) -> Moments:
    """Returns the moments of a layer's tokens, and sets their number.

    Args:
        layer: dense.
        calls: of it.
        needs: which moments are read.

    Raises:
        ValueError: moments that are constant or not finite, no tokens, or no influence on the features.
    """
    sums = MomentSums(layer.host.spec, layer.host.weights, needs)
    for call in calls():
        sums.add(call)
    for call in calls() if sums.second_sweep else ():
        sums.add_keys(call)
    layer.tokens = sums.tokens
    return sums.moments()


def needed_by(needs: Needs, options: Calibration) -> Needs:
    """Returns what a conversion ``needs`` with these options."""
    return needs._replace(rotations=needs.rotations and options.fold_rotations)


def collect_moments(
    model: nn.Module, layers: list[Layer], options: Calibration, batches: Iterable[Any], what: str
) -> Iterator[tuple[Layer, Moments]]:
    """Yields each layer with its moments, means over heads, one after the other.

    Args:
        model, layers, options, batches: as of ``calibrate``, which raises the same errors; the layers stay as they are.
        what: is done with the moments, in progress bars: 'choosing ranks of'.
    """
    inputs = collect_inputs(model, batches, options.images)
    with evaluating(model), progress_bar(total=len(layers), what=what, unit="layers") as bar:
        for layer, calls in layers_with_calls(model, layers, inputs, options):
            bar.set_description(f"{what} {layer.name}")
            layer.images = sum(map(len, inputs))
            with located(layer.name), timed(layer), torch.no_grad():
                moments = sum_moments(layer, calls, needed_by(MEANS, options))
            yield layer, moments
            bar.update()


def convert_layer(layer: CalibratedLayer, calls: Calls, options: Calibration) -> Moments:
    """Converts one layer from its moments, and returns these.

    Args:
        layer: its replacement is changed in place.
        calls: of its dense module.
        options: damping, folding.

    Raises:
        ValueError: too few tokens, or see ``sum_moments``.
    """
    moments = sum_moments(layer, calls, needed_by(layer.replacement.needs, options))
    widths = [linear.out_features for linear in layer.replacement.input_projections()]
    needed = min(layer.host.spec.embed_dim, max(widths, default=1))
    if moments.tokens < needed:
        raise ValueError(f"{moments.tokens} tokens are too few for rank {needed}; give more of them")
    layer.replacement.convert_calibrated(layer.host.weights.double(), moments, options.damping)
    return moments


def readout_sums(layer: CalibratedLayer, calls: Calls) -> HeldOut:
    """Returns the moments for the regression of the host's outputs on what the replacement mixes.

    Args:
        layer: converted.
        calls: of its dense module.
    """
    sums: HeldOut | None = None
    for call in calls():
        mixed = layer.replacement.mix(call.x, call.attn_mask, call.is_causal, call.rope)
        if sums is None:
            sums = HeldOut.like(mixed, call.y, centre=layer.replacement.has_out_bias)
        sums.add(mixed, call.y, call.token_weights().float())
    assert sums is not None
    return sums


def relative_error(layer: CalibratedLayer, calls: Calls, least: float | None = None) -> float:
    """Returns ||y^ - y|| / ||y - mean y|| of the replacement over the tokens of a layer's calls.

    Args:
        layer: converted.
        calls: of its dense module.
        least: the first call whose error is above it decides: its error is returned.
    """
    errors = ErrorSums()
    for call in calls():
        output = layer.replacement.run(Call(call.x, call.attn_mask, call.is_causal, call.rope))
        errors.add(call.of_tokens(output), call.of_tokens(call.y))
        if least is not None and errors.relative() > least:
            break
    return errors.relative()
