"""plan, patch, unpatch: read hosts, build and convert their replacements, install them. All errors come before any change."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from vit_tucker.attention.options import Calibration, MethodConfig
from vit_tucker.errors import PatchError
from vit_tucker.hosts import find
from vit_tucker.hosts.slot import ATTENTION, SLOTS, Slot, get_slot, slot_of
from vit_tucker.patching.follow import follow, refuse_lost
from vit_tucker.patching.identity import identity_of, mark
from vit_tucker.patching.method import Method, method_config
from vit_tucker.patching.prepare import prepare, undisturbed
from vit_tucker.patching.record import PatchRecord, configs_of, patch_record, patch_records, set_module, set_records
from vit_tucker.patching.report import PatchReport
from vit_tucker.patching.selection import Selection
from vit_tucker.show.progress_bars import showing_progress


def patch(
    model: nn.Module,
    config: Method,
    *,
    layers: Selection | None = None,
    exclude: Selection | None = None,
    calibration: Iterable[Any] | None = None,
    keep_originals: bool = True,
    img_size: int | tuple[int, int] | None = None,
    progress: bool | None = None,
    **options: Any,
) -> PatchReport:
    """Replaces attention modules of a timm model, or linear layers, in place: the config's class says which.

    Both can be patched, in either order, each by a call of its own. ``calibration`` is for attention.

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
        progress: show progress bars of what takes long: None, on a terminal or in a notebook (the environment's TQDM_DISABLE=1
            switches them off); True always, False never.
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
    if calibration is not None and config.fitted_to is None:
        if "calibration" not in type(config).model_fields:
            raise PatchError(f"calibration: {config.method} is converted by weights alone; leave it out")
        config = config.model_copy(update={"calibration": Calibration()})
    if config.fitted_to is not None and calibration is None:
        raise PatchError("calibration is set but there are no images: patch(model, config, calibration=batches)")
    _refuse_wrapped_or_patched(model, config)
    with undisturbed(model), showing_progress(progress):
        config, replacements, report = prepare(model, config, img_size, calibration, applied=True)
    originals: dict[str, nn.Module] = {}
    for name, replacement in replacements.items():
        originals[name] = model.get_submodule(name)
        set_module(model, name, replacement)
    records = patch_records(model)
    identity = next((record.identity for record in records.values()), None) or identity_of(model)
    records[slot_of(config).name] = PatchRecord(config, report, originals if keep_originals else None, identity)
    mark(model, configs_of(records), identity)
    set_records(model, records)
    return report


def plan(
    model: nn.Module,
    config: Method,
    *,
    layers: Selection | None = None,
    exclude: Selection | None = None,
    img_size: int | tuple[int, int] | None = None,
    progress: bool | None = None,
    **options: Any,
) -> PatchReport:
    """Returns the report, or raises the errors, that ``patch`` would give.

    Nothing is touched: neither the model, nor the random number generators.

    Args:
        model: as for ``patch``; on the meta device the report has no errors of weights.
        config: as for ``patch``; with a ``calibration``, for which there are no images here, it has none either.
        layers: modules to patch, in place of ``config.layers``.
        exclude: modules to leave alone, in place of ``config.exclude``.
        img_size: image size in pixels for the FLOPs; the model's own if None.
        progress: see ``patch``.
        options: of the method, beside its name.

    Returns:
        The report, with ``applied`` False.

    Raises:
        ConfigError: no such method or option; names the nearest one.
        PatchError: the model can't be patched as asked; see ``patch``.
    """
    config = method_config(model, config, options)
    model = find.inner(model)
    _refuse_wrapped_or_patched(model, config)
    with undisturbed(model), showing_progress(progress):
        return prepare(model, _placed(config, layers, exclude), img_size, None, applied=False).report


def unpatch(model: nn.Module, slot: str | None = None) -> None:
    """Puts the original modules back: the same objects with the same tensors.

    They follow what has changed since the patch: device, dtype, train/eval mode and requires_grad are those of the replacements,
    see ``vit_tucker.patching.follow``. Position biases are resized if timm's ``set_input_size`` has resized those of the
    replacements; blocks that timm has pruned stay away.

    Args:
        model: patched, by ``patch`` with ``keep_originals``.
        slot: 'attention' or 'linear': undo that patch alone; None: all of them.

    Raises:
        ConfigError: there is no such slot.
        PatchError: the model is not patched, or its originals were not kept or have no values; nothing has changed.
    """
    model = find.inner(model)
    records = patch_records(model)
    undone = list(records) if slot is None else [name for name in (get_slot(slot).name,) if name in records]
    if not undone:
        raise PatchError(f"the model is not patched{'' if slot is None else f' ({slot})'}")
    present = dict(model.named_modules(remove_duplicate=False))  # timm's prune_intermediate_layers takes blocks away
    pairs: dict[str, tuple[Slot, nn.Module, nn.Module]] = {}
    for key in undone:
        originals = records[key].originals
        if originals is None:
            raise PatchError(
                "the original modules were not kept (patch(..., keep_originals=False)); load the model again"
            )
        pairs |= {name: (SLOTS[key], old, present[name]) for name, old in originals.items() if name in present}
    for name, (_, original, current) in pairs.items():
        refuse_lost(name, original, current)
    for kind, original, current in pairs.values():
        kind.restore(original, current)
    follow([(original, current) for _, original, current in pairs.values()])
    for name, (_, original, _) in pairs.items():
        set_module(model, name, original)
    identity = records[undone[0]].identity
    kept = {key: record for key, record in records.items() if key not in undone}
    mark(model, configs_of(kept), identity)
    set_records(model, kept)


def config_of(model: nn.Module, slot: str = ATTENTION.name) -> Any:
    """Returns the config of a patched model, with the ranks that its layers have by now: rules name those that were resized.

    Args:
        model: patched.
        slot: 'attention' or 'linear'.

    Raises:
        PatchError: the model is not patched there.
    """
    record = patch_record(model, slot)
    if record is None:
        raise PatchError("the model is not patched")
    return record.config


def _placed(config: MethodConfig, layers: Selection | None, exclude: Selection | None) -> MethodConfig:
    """Returns the config with ``layers`` and ``exclude`` of the call, so that the record describes the whole patch."""
    given = {"layers": layers, "exclude": exclude}
    update = {k: v if isinstance(v, int | str) else tuple(v) for k, v in given.items() if v is not None}
    return config.model_copy(update=update) if update else config


def _refuse_wrapped_or_patched(model: nn.Module, config: MethodConfig) -> None:
    find.refuse_wrapped(model)
    if patch_record(model, slot_of(config).name) is not None:
        raise PatchError("the model is already patched; call vit_tucker.unpatch(model) first")
