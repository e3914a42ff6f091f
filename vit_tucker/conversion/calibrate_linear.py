"""Activation-aware conversion of linear layers: the nearest weight of a rank for the tokens that a layer sees.

The error of a weight W' on tokens x, measured by probes g in the space of the outputs, is E (g . (W - W') x)^2, of which tokens
and probes are taken as independent:  || R_g (W - W') R_x ||_F^2,  R_g^2 = E[g g^T],  R_x^2 = Cov[x].  Its minimiser is the
truncated SVD of R_g W R_x, mapped back. A bias makes up for the mean of the tokens; a layer without one takes E[x x^T] for
Cov[x].
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.attention.options import Calibration
from vit_tucker.conversion.collect import collect_inputs
from vit_tucker.conversion.inputs import InputBatch
from vit_tucker.conversion.observe import evaluating, groups_within, located, timed
from vit_tucker.conversion.probes import objective_of
from vit_tucker.errors import PatchError
from vit_tucker.linear.base import InputMoments, LinearSpec
from vit_tucker.show.progress_bars import progress_bar

SUM_BYTES = 2 * 2**30
"""The sums of layers are kept up to this at a time; what does not fit costs further passes over the inputs."""


@dataclass
class LinearSums:
    """Running sums of one layer's tokens and probes, float64.

    Attributes:
        tokens: how many there were.
        total: sum of x, (I,).
        inputs: sum of x x^T, (I, I).
        outputs: sum of g g^T, (O, O).
    """

    tokens: int
    total: Tensor
    inputs: Tensor
    outputs: Tensor

    @classmethod
    def of(cls, spec: LinearSpec, like: Tensor) -> "LinearSums":
        """Returns sums of no tokens.

        Args:
            spec: of the layer.
            like: a tensor (any shape) on its device.
        """

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=like.device)

        return cls(0, zeros(spec.in_features), zeros(spec.in_features, spec.in_features),
                   zeros(spec.out_features, spec.out_features))  # fmt: skip

    def add(self, x: Tensor, probe: Tensor | None) -> None:
        """Adds tokens x (..., I) and probes (..., O), None for errors in the layer's own output; products in float32 at least."""
        x = wide(x)
        self.tokens += len(x)
        self.total += x.sum(0)
        self.inputs += x.mT @ x
        if probe is not None:
            self.outputs += wide(probe).mT @ wide(probe)
        else:
            self.outputs.diagonal().add_(len(x))

    def moments(self) -> InputMoments:
        """Returns the means; raises ValueError without tokens, or for values that are not finite."""
        if self.tokens == 0:
            raise ValueError("no tokens reached the layer: a head is called with objective='likelihood' alone")
        found = InputMoments(self.total / self.tokens, self.inputs / self.tokens, self.outputs / self.tokens)
        if not all(torch.isfinite(part).all() for part in found):
            raise ValueError("the tokens or their gradients are not finite")
        if not found.outputs.any():
            raise ValueError("the layer's output has no influence on the model's features")
        return found


def wide(x: Tensor) -> Tensor:
    """Flattens (..., I) to (tokens, I); float64 stays, anything narrower becomes float32."""
    return (x if x.dtype == torch.float64 else x.float()).flatten(0, -2)


def calibrate_linear(model: nn.Module, layers: Sequence[Any], options: Calibration, batches: Iterable[Any]) -> None:
    """Converts the layers' replacements, and fills in their seconds and output errors. The model is not changed.

    Args:
        model: dense, on its device.
        layers: ``CalibratedLayer`` of distinct linear modules of the model.
        options: images, objective, damping.
        batches: as of ``collect_inputs``.

    Raises:
        PatchError: no inputs, some that the model does not take, constant tokens, values that are not finite, or options that
            linear layers have no use for.
    """
    if options.refine_steps or options.sequential:
        name = "refine_steps" if options.refine_steps else "sequential"
        raise PatchError(
            f"calibration: {name} is for attention; linear layers are converted in closed form, leave it out"
        )
    inputs = collect_inputs(model, batches, options.images)
    with evaluating(model), progress_bar(total=len(layers), what="converting", unit="layers") as bar:
        for group in groups_within(layers, lambda layer: sum_bytes(layer.host.spec), SUM_BYTES):
            sums = sum_inputs(model, group, inputs, options)
            for layer in group:
                layer.images, layer.tokens = sum(map(len, inputs)), sums[layer.name].tokens
                with torch.no_grad(), timed(layer), located(layer.name):
                    moments = sums.pop(layer.name).moments()
                    layer.replacement.convert_calibrated(layer.host.weights.double(), moments, options.damping)
                    layer.output_error = output_error(layer, moments)
                bar.update()


def sum_bytes(spec: LinearSpec) -> int:
    """Returns the memory of a layer's sums."""
    return 8 * (spec.in_features**2 + spec.out_features**2)


def sum_inputs(
    model: nn.Module, layers: Sequence[Any], inputs: Sequence[InputBatch], options: Calibration
) -> dict[str, LinearSums]:
    """Returns the sums of layers by name, in one pass over the inputs.

    Args:
        model: in eval mode.
        layers: of the model.
        inputs: batches.
        options: objective and seed.

    Raises:
        PatchError: no gradients, where the objective needs them.
    """
    generator = torch.Generator().manual_seed(options.seed)
    sums = {layer.name: LinearSums.of(layer.host.spec, layer.host.weights.weight) for layer in layers}
    channels_first = {layer.name: layer.host.spec.channels_first for layer in layers}
    backward = options.objective != "layer"
    calls: list[tuple[str, Tensor, Tensor]] = []

    def hook(name: str) -> Any:
        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if backward and not output.requires_grad:
                output.requires_grad_(True)
            calls.append((name, (args[0] if args else kwargs["input"]).detach(), output))

        return seen

    handles = [layer.module.register_forward_hook(hook(layer.name), prepend=True, with_kwargs=True) for layer in layers]
    try:
        for batch in progress_bar(inputs, what=f"tokens of {len(layers)} layers", unit="batches"):
            with torch.set_grad_enabled(backward):
                target = objective_of(model, batch, options.objective, generator)
            outputs = [y for *_, y in calls]
            probes: Sequence[Tensor | None] = [None] * len(calls)
            if target is not None and outputs:
                grads = torch.autograd.grad(target, outputs, allow_unused=True)
                probes = [torch.zeros_like(y) if grad is None else grad for grad, y in zip(grads, outputs, strict=True)]
            for (name, x, _), probe in zip(calls, probes, strict=True):
                if channels_first[name]:
                    x, probe = x.movedim(1, -1), None if probe is None else probe.movedim(1, -1)
                if batch.valid is not None and batch.valid.shape == x.shape[:-1]:
                    x, probe = x[batch.valid], None if probe is None else probe[batch.valid]
                sums[name].add(x, probe)
            calls.clear()
    finally:
        for handle in handles:
            handle.remove()
    return sums


def output_error(layer: Any, moments: InputMoments) -> float:
    """Returns ||y' - y|| / ||y - mean y|| over the tokens, from their moments.

    Args:
        layer: converted.
        moments: of its tokens.
    """
    wanted, got = layer.host.weights.double(), layer.replacement.dense_weights()
    change = got.weight - wanted.weight
    shift = torch.zeros_like(change[:, 0]) if wanted.bias is None else got.bias - wanted.bias
    squares = (change @ moments.inputs * change).sum() + 2 * shift @ (change @ moments.mean) + shift.square().sum()
    covariance = moments.inputs - moments.mean.outer(moments.mean)
    variance = (wanted.weight @ covariance * wanted.weight).sum()
    return float((squares.clamp_min(0) / variance.clamp_min(1e-300)).sqrt())
