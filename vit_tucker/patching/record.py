"""Stores what a patched model remembers: one record per slot."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from vit_tucker.attention.options import MethodConfig
from vit_tucker.hosts.find import inner
from vit_tucker.hosts.slot import ATTENTION, get_slot
from vit_tucker.patching.identity import Identity, mark
from vit_tucker.patching.report import PatchReport
from vit_tucker.patching.resized import current_config, current_report

RECORDS = "_vit_tucker_patches"


@dataclass
class PatchRecord:
    """The config, originals and report of a patch, as the patched model remembers them.

    A plain object, so that the originals are neither submodules nor in the state dict.

    Attributes:
        config: the config of the patch, with the ranks that rank rules chose.
        report: what was done.
        originals: replaced modules by full name; None if they were not kept.
        identity: the name and arguments under which timm knew the model before.
    """

    config: Any
    report: PatchReport
    originals: dict[str, nn.Module] | None
    identity: Identity


def patch_record(model: nn.Module, slot: str = ATTENTION.name) -> PatchRecord | None:
    """Returns config, report and originals of a patched model; None if it is not patched there.

    Args:
        model: any module.
        slot: 'attention' or 'linear'.

    Raises:
        ConfigError: there is no such slot.
    """
    return patch_records(model).get(get_slot(slot).name)


def patch_records(model: nn.Module) -> dict[str, PatchRecord]:
    """Returns the records of a model by slot, with the ranks that its layers have by now; empty if it is not patched."""
    model = inner(model)
    records: dict[str, PatchRecord] = dict(vars(model).get(RECORDS, {}))
    for record in records.values():
        if (config := current_config(model, record.config)) is not record.config:
            record.report = current_report(model, record.report, record.config, config, records.values())
            record.config = config
            mark(model, configs_of(records), record.identity)
    return records


def host_name(model: nn.Module) -> str | None:
    """Returns timm's name of a model, of its host if it is patched; None if it has none."""
    record = next(iter(patch_records(model).values()), None)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return cfg.get("architecture") if record is None else record.identity.architecture


def set_records(model: nn.Module, records: dict[str, PatchRecord]) -> None:
    """Sets the records of a model; without any it is as if it had never been patched."""
    if records:
        vars(model)[RECORDS] = records
    else:
        vars(model).pop(RECORDS, None)


def configs_of(records: dict[str, PatchRecord]) -> dict[str, MethodConfig]:
    """Returns the configs of records by slot."""
    return {name: record.config for name, record in records.items()}


def shared_records(model: nn.Module) -> dict[int, Any]:
    """Returns the records for ``copy.deepcopy``: a copy shares them, and so has no copies of the replaced modules."""
    return {id(record): record for record in patch_records(model).values()}


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces the module of that full name.

    Args:
        model: changed in place.
        name: full name of a submodule of ``model``.
        module: its replacement.
    """
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
