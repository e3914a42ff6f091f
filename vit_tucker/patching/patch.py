"""plan, patch, unpatch: read hosts, build and convert their replacements, install them. All errors come before any change."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vit_tucker.attention.base import AttentionConfig, HostSpec
from vit_tucker.attention.effective import trains
from vit_tucker.attention.module import AttentionModule
from vit_tucker.attention.options import Calibration
from vit_tucker.attention.variants.gqa import GQAConfig
from vit_tucker.attention.variants.mha import MHAConfig
from vit_tucker.errors import PatchError
from vit_tucker.patching import find, hosts
from vit_tucker.patching.calibrate import CalibratedLayer, calibrate
from vit_tucker.patching.follow import follow, refuse_lost
from vit_tucker.patching.identity import Identity, identity_of, mark, unmark
from vit_tucker.patching.layer_configs import choose_layers, describe_options, layer_configs, without_stale_choices
from vit_tucker.patching.method import Method, method_config
from vit_tucker.patching.notes import CHOSEN_BY_WEIGHTS, optimizer_notes, rotation_notes, token_notes, weight_notes
from vit_tucker.patching.plain import refuse_not_finite
from vit_tucker.patching.probe import count_tokens
from vit_tucker.patching.ranks import resolve_ranks
from vit_tucker.patching.readers import Host
from vit_tucker.patching.report import LayerReport, PatchReport
from vit_tucker.patching.selection import Selection
from vit_tucker.patching.watch import collect_images, timed
from vit_tucker.tensor.rotary import tensor_distance
from vit_tucker.tensor.tucker import relative_distance

RECORD = "_vit_tucker_patch"


@dataclass
class PatchRecord:
    """What a patched model remembers. A plain object, so that the originals are no submodules and not in the state dict.

    Attributes:
        config: the config of the patch, with the ranks that rank rules chose.
        report: what was done.
        originals: replaced modules by full name; None if they were not kept.
        identity: what the model told timm of itself before.
    """

    config: AttentionConfig
    report: PatchReport
    originals: dict[str, nn.Module] | None
    identity: Identity


class Prepared(NamedTuple):
    """Everything that a patch installs.

    Attributes:
        config: with the ranks that rank rules chose.
        replacements: by full module name.
        report: of the patch.
    """

    config: AttentionConfig
    replacements: dict[str, AttentionModule]
    report: PatchReport


def patch(
    model: nn.Module,
    config: Method,
    *,
    layers: Selection | None = None,
    exclude: Selection | None = None,
    calibration: Iterable[Any] | None = None,
    keep_originals: bool = True,
    img_size: int | tuple[int, int] | None = None,
    **options: Any,
) -> PatchReport:
    """Replace attention modules of a timm model, in place.

    Device, dtype, train/eval mode and requires_grad follow the replaced modules. With ``config.init == "pretrained"`` the
    host's weights are converted in float64; each method says when that is exact. Make optimizers afterwards: one that was made
    before holds the replaced parameters and never trains the new ones, as the report's notes then say.

    Random layers (``config.init == "random"``) start from the state of torch's generators, which are restored afterwards: two
    patches without a draw between them, or a new ``torch.manual_seed``, give equal layers.

    Args:
        model: a timm model (or any module that contains attention of timm), not wrapped by DDP, FSDP or torch.compile. PEFT's
            adapters on attention are merged into the new layers; inside its ``get_peft_model`` the timm model is patched.
        config: method and options, e.g. ``TuckerConfig(ranks=(8, 16, 16))``; or the method's name, with its options as keywords:
            ``patch(model, "tucker", ranks=(8, 16, 16))``; or a mapping as in a YAML's attention section.
        layers: modules to patch, in place of ``config.layers``.
        exclude: modules to leave alone, in place of ``config.exclude``.
        calibration: batches of images as the model takes them, (B, channels, height, width) tensors or tuples that start with
            one, such as a DataLoader: the conversion then minimises the error on the tokens that each layer sees, with the
            options of ``config.calibration``. No labels are used.
        keep_originals: keep the replaced modules, so that ``unpatch`` can restore them; costs their memory.
        img_size: image size in pixels for the FLOPs; the model's own if None.
        options: of the method, beside its name.

    Returns:
        The report; print it for a table.

    Raises:
        ConfigError: no such method or option; names the nearest one.
        PatchError: the model can't be patched as asked; the message names the module and the reason, nothing has changed.
    """
    config = method_config(model, config, options)
    model = find.inner(model)
    config = _placed(config, layers, exclude)
    if calibration is not None and config.calibration is None:
        config = config.model_copy(update={"calibration": Calibration()})
    if config.calibration is not None and calibration is None:
        raise PatchError("calibration is set but there are no images: patch(model, config, calibration=batches)")
    with _undisturbed(model):
        config, replacements, report = _prepare(model, config, img_size, calibration, applied=True)
    originals: dict[str, nn.Module] = {}
    for name, replacement in replacements.items():
        originals[name] = model.get_submodule(name)
        _set_module(model, name, replacement)
    identity = identity_of(model)
    mark(model, config, identity)
    setattr(model, RECORD, PatchRecord(config, report, originals if keep_originals else None, identity))
    return report


def plan(
    model: nn.Module,
    config: Method,
    *,
    layers: Selection | None = None,
    exclude: Selection | None = None,
    img_size: int | tuple[int, int] | None = None,
    **options: Any,
) -> PatchReport:
    """The report, and the errors, that ``patch`` would give.

    Nothing is touched: neither the model, nor the random number generators.

    Args:
        model: as for ``patch``; on the meta device the report has no errors of weights.
        config: as for ``patch``; with a ``calibration``, for which there are no images here, it has none either.
        layers: modules to patch, in place of ``config.layers``.
        exclude: modules to leave alone, in place of ``config.exclude``.
        img_size: image size in pixels for the FLOPs; the model's own if None.
        options: of the method, beside its name.

    Returns:
        The report, with ``applied`` False.

    Raises:
        ConfigError: no such method or option; names the nearest one.
        PatchError: the model can't be patched as asked; see ``patch``.
    """
    config = method_config(model, config, options)
    model = find.inner(model)
    with _undisturbed(model):
        return _prepare(model, _placed(config, layers, exclude), img_size, None, applied=False).report


def unpatch(model: nn.Module) -> None:
    """Put the original modules back: the same objects with the same tensors.

    They follow what has changed since the patch: device, dtype, train/eval mode and requires_grad are those of the replacements,
    see ``vit_tucker.patching.follow``. Position biases are resized if timm's ``set_input_size`` has resized those of the
    replacements; blocks that timm has pruned stay away.

    Args:
        model: patched, by ``patch`` with ``keep_originals``.

    Raises:
        PatchError: the model is not patched, or its originals were not kept or have no values; nothing has changed.
    """
    model = find.inner(model)
    record = patch_record(model)
    if record is None:
        raise PatchError("the model is not patched")
    if record.originals is None:
        raise PatchError("the original modules were not kept (patch(..., keep_originals=False)); load the model again")
    present = dict(model.named_modules(remove_duplicate=False))  # timm's prune_intermediate_layers takes blocks away
    pairs = {name: (old, present[name]) for name, old in record.originals.items() if name in present}
    for name, (original, current) in pairs.items():
        refuse_lost(name, original, current)
    for original, current in pairs.values():
        if isinstance(current, AttentionModule) and current.position_bias is not None:
            hosts.follow_window_size(original, current.position_bias)
    follow(pairs.values())
    for name, (original, _) in pairs.items():
        _set_module(model, name, original)
    unmark(model, record.identity)
    delattr(model, RECORD)


def patch_record(model: nn.Module) -> PatchRecord | None:
    """Config, report and originals of a patched model.

    Args:
        model: any module.

    Returns:
        The record of its patch; None if it is not patched.
    """
    return getattr(find.inner(model), RECORD, None)


def _placed(config: AttentionConfig, layers: Selection | None, exclude: Selection | None) -> AttentionConfig:
    """The config with ``layers`` and ``exclude`` of the call, so that the record tells the whole patch."""
    given = {"layers": layers, "exclude": exclude}
    update = {k: v if isinstance(v, int | str) else tuple(v) for k, v in given.items() if v is not None}
    return config.model_copy(update=update) if update else config


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Draws of torch inside start from its generators' state, which is restored afterwards, as if nothing had been drawn; tensors
    made inside can be trained, also where the caller is in torch.inference_mode."""
    cuda = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[index for index in cuda if index is not None]), ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        yield


def _prepare(
    model: nn.Module,
    config: AttentionConfig,
    img_size: int | tuple[int, int] | None,
    batches: Iterable[Any] | None,
    applied: bool,
) -> Prepared:
    """Read, check, build and convert everything; nothing in the model changes."""
    find.refuse_wrapped(model)
    if patch_record(model) is not None:
        raise PatchError("the model is already patched; call vit_tucker.unpatch(model) first")
    if config.calibration is not None and config.init != "pretrained":
        raise PatchError(f"calibration converts pretrained weights, but init is '{config.init}'")
    found = find.find_attention(model)
    if not found:
        raise PatchError(f"{type(model).__name__} has no attention module that vit_tucker knows")
    chosen = choose_layers(config, list(found))
    config = without_stale_choices(config, list(found), chosen)
    configs = layer_configs(config, list(found), chosen)
    notes = optimizer_notes(found[name] for name in chosen)
    mixed_rope = hosts.has_mixed_rope(model)
    read = {name: _read(name, found[name], configs[name], mixed_rope) for name in chosen}
    tokens = count_tokens(model, {name: host.spec.layout for name, host in read.items()}, img_size)
    images = None
    if config.calibration is not None and batches is not None:
        images = collect_images(model, batches, config.calibration.images)
    if any(layer.rank_rule is not None for layer in configs.values()):
        config = resolve_ranks(model, config, configs, read, tokens, images)
        configs = layer_configs(config, list(found), chosen)
        if config.calibration is not None and images is None:
            notes += (CHOSEN_BY_WEIGHTS,)
    built: dict[int, CalibratedLayer] = {}  # a module that stands at several places gets one replacement
    for name in chosen:
        layer = built.get(id(found[name]))
        if layer is None:
            built[id(found[name])] = _build(name, found[name], read[name], configs[name])
        elif configs[layer.name] != configs[name]:
            raise PatchError(f"{name}: is the same module as {layer.name}, but the rules give it other options")
    converted = _convert(model, config, list(built.values()), images)
    layers = {name: built[id(found[name])] for name in chosen}
    rows = tuple(_row(name, layer, configs[name], tokens.get(name), converted) for name, layer in layers.items())
    left = tuple([name for name in found if name not in read] + find.find_other_attention(model))
    replacements = {name: layer.replacement for name, layer in layers.items()}
    notes += rotation_notes(read, replacements) + weight_notes(read, {name: found[name] for name in chosen})
    notes += token_notes([layer for layer in built.values() if layer.images])
    report = PatchReport(rows, left, applied, notes)
    return Prepared(config, replacements, report)


def _read(name: str, module: nn.Module, config: AttentionConfig, mixed_rope: bool) -> Host:
    try:
        host = hosts.read_host(module, mixed_rope)
        config.refuse_features(host.spec)
        config.check(host.spec)
        if config.init == "pretrained":
            refuse_not_finite(host)
    except PatchError as error:
        raise type(error)(f"{name}: {error}") from None
    return host


def _build(name: str, module: nn.Module, host: Host, config: AttentionConfig) -> CalibratedLayer:
    """The new module, newly initialised, with device, dtype, mode and requires_grad of the old one."""
    like = host.weights.query
    replacement = config.build(host.spec, device=like.device, dtype=like.dtype)
    config.settle(replacement)
    replacement.requires_grad_(trains(module))
    return CalibratedLayer(name, module, host, replacement=replacement.train(module.training))


def _convert(
    model: nn.Module, config: AttentionConfig, layers: list[CalibratedLayer], images: list[Tensor] | None
) -> bool:
    """Convert the host's weights, for the images if there are any. Returns whether there was something to convert."""
    if config.init != "pretrained" or any(layer.host.weights.query.is_meta for layer in layers):
        return False
    if config.calibration is not None:
        if images is None:  # a plan: its images are not at hand
            return False
        calibrate(model, layers, config.calibration, images)
        return True
    for layer in layers:
        with timed(layer), torch.no_grad():
            layer.replacement.convert_from(layer.host.weights.double())
    return True


def _row(
    name: str, layer: CalibratedLayer, config: AttentionConfig, tokens: tuple[int, int] | None, converted: bool
) -> LayerReport:
    host, replacement = layer.host, layer.replacement
    pre_error = post_error = None
    if converted:
        weights = host.weights.double()
        pre_error = tensor_distance(weights.pre_tensor(host.spec.rope), replacement.pre_tensor()).item()
        post_error = relative_distance(weights.post_pairs(), replacement.post_pairs()).item()

    def flops(method: AttentionConfig, spec: HostSpec) -> int | None:
        return None if tokens is None else tokens[0] * method.count_flops(spec, tokens[1])

    groups = host.spec.num_kv_heads
    dense: AttentionConfig = MHAConfig() if groups is None else GQAConfig(num_kv_heads=groups)
    return LayerReport(
        name=name,
        method=config.method,
        options=describe_options(config),
        params_before=host.parameters,
        params_after=config.count_parameters(host.spec),
        pre_error=pre_error,
        post_error=post_error,
        output_error=layer.output_error if converted and config.calibration is not None else None,
        seconds=layer.seconds if converted else None,
        flops_before=flops(dense, host.spec),
        flops_after=flops(config, host.spec),
        shared_with=None if name == layer.name else layer.name,
    )


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
