"""Builds what a patch installs: hosts are read, their replacements built and converted, while the model stays as it is."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from vit_tucker.attention.effective import trains
from vit_tucker.attention.options import MethodConfig
from vit_tucker.conversion.calibrate import calibrate
from vit_tucker.conversion.calibrate_linear import calibrate_linear
from vit_tucker.conversion.choose_ranks import resolve_ranks
from vit_tucker.conversion.collect import collect_inputs
from vit_tucker.conversion.inputs import InputBatch
from vit_tucker.conversion.observe import CalibratedLayer, timed
from vit_tucker.errors import PatchError, naming
from vit_tucker.hosts.slot import LINEAR, Slot, slot_of
from vit_tucker.hosts.tokens import count_calls, sequence_unit
from vit_tucker.patching.layer_configs import choose_layers, describe_options, layer_configs, without_stale_choices
from vit_tucker.patching.notes import (
    CHOSEN_BY_WEIGHTS,
    folding_notes,
    optimizer_notes,
    rotation_notes,
    token_notes,
    untrained_notes,
    weight_notes,
)
from vit_tucker.patching.record import patch_records
from vit_tucker.patching.report import LayerReport, PatchReport
from vit_tucker.show.progress_bars import each

CONVERSIONS = {"attention": calibrate, "linear": calibrate_linear}
"""What converts the layers of a slot for the inputs of a calibration."""


class Prepared(NamedTuple):
    """Everything that a patch installs.

    Attributes:
        config: with the ranks that rank rules chose.
        replacements: by full module name.
        report: of the patch.
    """

    config: MethodConfig
    replacements: dict[str, nn.Module]
    report: PatchReport


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restores the state of torch's random generators after the block, so that draws inside have no effect outside.

    Tensors made inside can be trained, also where the caller is in torch.inference_mode.
    """
    cuda = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[index for index in cuda if index is not None]), ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        yield


def prepare(
    model: nn.Module,
    config: MethodConfig,
    img_size: int | tuple[int, int] | None,
    batches: Iterable[Any] | None,
    applied: bool,
) -> Prepared:
    """Reads, checks, builds and converts all that a patch installs; nothing in the model changes.

    Args:
        model: not patched in the config's slot.
        config: method and options, with the layers.
        img_size: see ``patch``.
        batches: of images to calibrate with; None for a plan, or without calibration.
        applied: what the report is to say.

    Raises:
        PatchError: the model can't be patched as asked.
    """
    slot, calibration = slot_of(config), config.fitted_to
    if calibration is not None and config.init != "pretrained":
        raise PatchError(f"calibration converts pretrained weights, but init is '{config.init}'")
    found = slot.find(model, config.layers)
    if not found:
        raise PatchError(f"{type(model).__name__} has no {slot.noun} that vit_tucker supports")
    chosen = choose_layers(config, list(found))
    config = without_stale_choices(config, list(found), chosen)
    configs = layer_configs(config, list(found), chosen)
    notes = optimizer_notes(found[name] for name in chosen)
    read = {name: _read(slot, name, found[name], configs[name], model) for name in chosen}
    counters = {name: slot.counter(host) for name, host in read.items()}
    counters[""] = lambda args, kwargs: (1, 1)  # the model itself: whether it runs
    tokens = count_calls(model, counters, img_size, patch_records(model).values())
    if slot is LINEAR and "" in tokens and (uncalled := [name for name in chosen if name not in tokens]):
        raise PatchError(f"{uncalled[0]}: is never called: another module reads its weight by itself; leave it out")
    inputs = None
    if calibration is not None and batches is not None:
        inputs = collect_inputs(model, batches, calibration.images)
    if any(layer.rank_rule is not None for layer in configs.values()):
        config = resolve_ranks(model, config, configs, read, tokens, inputs)
        configs = layer_configs(config, list(found), chosen)
        if calibration is not None and inputs is None:
            notes += (CHOSEN_BY_WEIGHTS,)
    built: dict[int, CalibratedLayer] = {}  # a module that stands at several places gets one replacement
    for name in chosen:
        layer = built.get(id(found[name]))
        if layer is None:
            built[id(found[name])] = _build(name, found[name], read[name], configs[name])
        elif configs[layer.name] != configs[name]:
            raise PatchError(f"{name}: is the same module as {layer.name}, but the rules give it other options")
    converted = _convert(model, config, list(built.values()), inputs)
    for layer in built.values():
        with naming(layer.name):
            slot.install(layer.replacement, layer.module)
    layers = {name: built[id(found[name])] for name in chosen}
    rows = tuple(
        _row(slot, name, layer, configs[name], tokens.get(name), converted)
        for name, layer in (each(layers.items(), "measuring", "layers", itemgetter(0)) if converted else layers.items())
    )
    left = tuple([name for name in found if name not in read] + slot.find_others(model))
    replacements: dict[str, nn.Module] = {name: layer.replacement for name, layer in layers.items()}
    notes += rotation_notes(read, replacements) + weight_notes(read, {name: found[name] for name in chosen})
    notes += (
        folding_notes(config, layers, replacements)
        + token_notes(model, [layer for layer in built.values() if layer.images])
        + untrained_notes(model, config)
    )
    report = PatchReport(rows, left, applied, notes, slot.name, sequence_unit(model))
    return Prepared(config, replacements, report)


def _read(slot: Slot, name: str, module: nn.Module, config: MethodConfig, model: nn.Module) -> Any:
    with naming(name):
        host = slot.read(module, model)
        config.refuse_features(host.spec)
        config.check(host.spec)
        if config.init == "pretrained":
            host.refuse_not_finite()
    return host


def _build(name: str, module: nn.Module, host: Any, config: MethodConfig) -> CalibratedLayer:
    """Returns the new module, newly initialised, with device, dtype, mode and requires_grad of the old one."""
    replacement = config.build(host.spec, device=host.like.device, dtype=host.like.dtype)
    config.set_options(replacement)
    replacement.requires_grad_(trains(module))
    return CalibratedLayer(name, module, host, replacement=replacement.train(module.training))


def _convert(
    model: nn.Module, config: MethodConfig, layers: list[CalibratedLayer], inputs: list[InputBatch] | None
) -> bool:
    """Converts the hosts' weights, for the calibration's inputs if there are any; returns whether there was something to do."""
    if config.init != "pretrained" or any(layer.host.like.is_meta for layer in layers):
        return False
    if config.fitted_to is not None:
        if inputs is None:  # a plan: its images are not at hand
            return False
        CONVERSIONS[slot_of(config).name](model, layers, config.fitted_to, inputs)
        return True
    for layer in each(layers, "converting", "layers"):
        with timed(layer), torch.no_grad():
            layer.replacement.convert_from(layer.host.weights.double())
    return True


def _row(
    slot: Slot,
    name: str,
    layer: CalibratedLayer,
    config: MethodConfig,
    tokens: tuple[int, int] | None,
    converted: bool,
) -> LayerReport:
    host = layer.host
    errors: dict[str, float | None] = dict.fromkeys(slot.columns)
    if converted:
        errors |= slot.errors(host, layer.replacement)
        if config.fitted_to is not None:
            errors["output_error"] = layer.output_error

    def flops(count: Callable[[Any, int], int]) -> int | None:
        return None if tokens is None else tokens[0] * count(host.spec, tokens[1])

    return LayerReport(
        name=name,
        method=config.method,
        options=describe_options(config),
        params_before=host.parameters,
        params_after=config.count_parameters(host.spec),
        errors=errors,
        seconds=layer.seconds if converted else None,
        flops_before=flops(slot.dense_flops),
        flops_after=flops(config.count_flops),
        cached_before=slot.cached(host),
        cached_after=slot.cached(layer.replacement),
        shared_with=None if name == layer.name else layer.name,
    )
