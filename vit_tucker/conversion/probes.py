"""Calls of attention layers with what an error there would cost, kept in memory as far as they fit."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.attention.call import Call, to_sequences
from vit_tucker.attention.host import HostSpec
from vit_tucker.attention.moments import LayerCall
from vit_tucker.attention.options import Calibration
from vit_tucker.conversion.inputs import InputBatch
from vit_tucker.conversion.observe import Layer, detached, watching
from vit_tucker.errors import PatchError
from vit_tucker.show.progress_bars import progress_bar

CALL_BYTES = 2 * 2**30
"""The calls of layers are kept in memory up to this; what does not fit costs further passes over the inputs."""


def probed_batches(
    model: nn.Module, layers: list[Layer], inputs: Sequence[InputBatch], options: Calibration
) -> Iterator[list[tuple[Layer, LayerCall]]]:
    """Yields the layers' calls of each batch with their probes: gradients of what the objective asks for, or noise.

    Args:
        model: in eval mode, its layers still dense.
        layers: of the model.
        inputs: batches, as ``collect_inputs`` returns them.
        options: objective and seed.

    Raises:
        PatchError: no gradients, where the objective needs them.
    """
    generator = torch.Generator().manual_seed(options.seed)
    backward = options.objective != "layer"
    if backward and any(tensor.is_inference() for tensor in chain(model.parameters(), model.buffers())):
        raise PatchError(
            "calibration: the model's weights are inference tensors, which have no gradients: make the model outside of "
            "torch.inference_mode, or calibrate with objective='layer'"
        )

    for batch in progress_bar(inputs, what=f"tokens of {len(layers)} layers", unit="batches"):
        calls: list[tuple[Layer, Call, Tensor]] = []

        def note(layer: Layer, call: Call, y: Tensor, calls: Any = calls) -> None:
            if backward and not y.requires_grad:
                y.requires_grad_(True)
            calls.append((layer, detached(call), y))

        with torch.set_grad_enabled(backward), watching(layers, note):
            target = objective_of(model, batch, options.objective, generator)
        outputs = [y for *_, y in calls]
        if target is not None:
            grads = torch.autograd.grad(target, outputs, allow_unused=True)
            probes = [torch.zeros_like(y) if g is None else g for g, y in zip(grads, outputs, strict=True)]
        else:
            probes = [noise(y, generator) for y in outputs]
        yield [(layer, probed(layer.host.spec, call, y, probe, batch.valid))
               for (layer, call, y), probe in zip(calls, probes, strict=True)]  # fmt: skip


def probed(spec: HostSpec, call: Call, y: Tensor, probe: Tensor, valid: Tensor | None) -> LayerCall:
    """Returns a call with its probe, which is zero where no token counts, and its rotations (N', 2 D) or (B, 1, N', 2 D).

    Args:
        spec: of the host.
        call: without a graph.
        y, probe: (B, N, O) in the host's layout.
        valid: which tokens count, (B, N), or None.
    """
    y, probe, rope = to_sequences(y.detach(), spec.layout), to_sequences(probe, spec.layout), call.rope
    if valid is not None:
        probe = probe.masked_fill(~valid.unsqueeze(-1), 0.0)
    if rope is not None and rope.ndim == 3 and spec.rope is not None and not spec.rope.per_head:
        rope = rope[0] if len(rope) == 1 else rope.unsqueeze(1)
    return LayerCall(call.x, y, probe, call.attn_mask, call.is_causal, rope, valid)


def kept_calls(
    model: nn.Module, layers: list[Layer], inputs: Sequence[InputBatch], options: Calibration, limit: int
) -> dict[str, list[LayerCall]]:
    """Returns the calls of the leading layers by name, as many layers as fit into memory; none if not even one does.

    Args:
        model, layers, inputs, options: as of ``probed_batches``.
        limit: in bytes.
    """
    kept: dict[str, list[LayerCall]] = {layer.name: [] for layer in layers}
    used = 0
    for calls in probed_batches(model, layers, inputs, options):
        for layer, call in calls:
            if layer.name in kept:
                kept[layer.name].append(call)
                used += call.bytes
        while used > limit and kept:
            used -= sum(call.bytes for call in kept.popitem()[1])
        if not kept:
            break
    return kept


def layers_with_calls(
    model: nn.Module, layers: list[Layer], inputs: Sequence[InputBatch], options: Calibration
) -> Iterator[tuple[Layer, Callable[[], Iterable[LayerCall]]]]:
    """Yields each layer, and what its calls can be had from again and again: from memory, or by running the model anew.

    Args:
        model, layers, inputs, options: as of ``probed_batches``.
    """
    left = list(layers)
    while left:
        kept = kept_calls(model, left, inputs, options, CALL_BYTES)
        if not kept:
            layer = left.pop(0)
            yield layer, partial(calls_again, model, layer, inputs, options)
        while kept:
            layer = left.pop(0)
            calls = kept.pop(layer.name)
            yield layer, partial(iter, calls)
            del calls


def calls_again(
    model: nn.Module, layer: Layer, inputs: Sequence[InputBatch], options: Calibration
) -> Iterator[LayerCall]:
    """Yields the calls of one layer, by running the model anew.

    Args:
        model, inputs, options: as of ``probed_batches``.
        layer: dense.
    """
    for calls in probed_batches(model, [layer], inputs, options):
        yield from (call for _, call in calls)


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Returns random numbers of the shape of ``like`` (any), the same on every device."""
    return torch.randn(like.shape, generator=generator).to(like)


def objective_of(model: nn.Module, batch: InputBatch, objective: str, generator: torch.Generator) -> Tensor | None:
    """Runs the model, and returns the scalar whose gradients are the probes; None where noise is.

    Args:
        model: in eval mode, with gradients but for objective="layer".
        batch: its inputs.
        objective: see ``Calibration.objective``.
        generator: of the random numbers.

    Raises:
        PatchError: no gradients, or no scores.
    """
    if objective == "likelihood":
        return sampled_likelihood(batch.logits(model), generator, batch.valid)
    features = batch.features(model)
    return random_combination(features, generator, batch.valid) if objective == "features" else None


def sampled_likelihood(logits: Tensor, generator: torch.Generator, valid: Tensor | None) -> Tensor:
    """Returns the log-likelihood of classes, or tokens, that are drawn from the model's own distribution.

    The second moment of its gradient is the Fisher information: what an error costs in the divergence of the distributions.

    Args:
        logits: (..., classes).
        generator: of the draws.
        valid: which tokens count of logits (B, N, classes), (B, N); None: all.
    """
    refuse_without_gradients([logits] if logits.requires_grad else [])
    scores = (logits if valid is None else logits[valid]).flatten(0, -2).float().log_softmax(-1)
    uniform = torch.rand(len(scores), 1, generator=generator).to(scores)
    drawn = torch.searchsorted(scores.detach().exp().cumsum(-1), uniform).clamp_max(scores.shape[-1] - 1)
    return scores.gather(-1, drawn).sum()


def refuse_without_gradients(parts: list[Tensor]) -> None:
    """Raises PatchError without any features that have gradients.

    Args:
        parts: these features, (B, ...) of any shapes.
    """
    if not parts:
        raise PatchError(
            "calibration: the model's features have no gradients: does its forward turn them off? Or calibrate with "
            "objective='layer', which needs none"
        )


def random_combination(features: list[Tensor], generator: torch.Generator, valid: Tensor | None = None) -> Tensor:
    """Returns a scalar whose gradient is random in the space of the features.

    Args:
        features: (B, ...) of any shapes.
        generator: of the random numbers.
        valid: which tokens count of features (B, N, C), (B, N); None: all.

    Raises:
        PatchError: no feature has gradients.
    """
    parts = [(part if valid is None else part[valid]).float() for part in features if part.requires_grad]
    refuse_without_gradients(parts)
    return torch.stack([(part * noise(part, generator)).sum() for part in parts]).sum()
