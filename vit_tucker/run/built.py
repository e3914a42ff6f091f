"""A run's model as it is built, whatever it learns: patched by the methods of its config, with what is reported of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vit_tucker.attention.base import AttentionConfig
from vit_tucker.attention.options import MethodConfig
from vit_tucker.checkpoint.host_model import count_parameters
from vit_tucker.checkpoint.load_report import LoadReport
from vit_tucker.config.schema import RunConfig
from vit_tucker.errors import PatchError
from vit_tucker.hosts.slot import ATTENTION, slot_of
from vit_tucker.patching.record import patch_record
from vit_tucker.patching.report import PatchReport
from vit_tucker.run.same_run import stated_attention
from vit_tucker.storage.run_dir import RunDir
from vit_tucker.training.task import Task


@dataclass(frozen=True)
class BuiltModel:
    """The model of a run before training.

    Attributes:
        model: patched, on the device.
        num_classes: of the classifier.
        data: timm's data config (input size, normalisation, crop); of a language model the facts of its tokens.
        params: parameters: total, attention, dense_total, dense_attention.
        attention: config of the patch, with the ranks that a rank rule chose; None for a dense run.
        patch: the patch reports as plain values, that of linear layers under its slot's name; None for a dense run.
        reports: the patch reports, to be shown; none for a dense run and for one that goes on from weights of its own.
        host: the model before the patch, its structure alone (on the meta device).
        task: what it learns.
        teacher: dense, on the device; None if nothing is distilled.
        loads: what was loaded into the model, and into the teacher; empty for timm's initialisation and for a run that goes on
            from weights of its own.
    """

    model: nn.Module
    num_classes: int
    data: dict[str, Any]
    params: dict[str, int]
    attention: AttentionConfig | None
    patch: dict[str, Any] | None
    reports: tuple[PatchReport, ...]
    host: nn.Module
    task: Task
    teacher: nn.Module | None = None
    loads: tuple[LoadReport, ...] = ()


def patch_all(
    model: nn.Module,
    config: RunConfig,
    run_dir: RunDir,
    started: bool,
    training: bool,
    patch_one: Callable[[MethodConfig], PatchReport],
) -> list[PatchReport]:
    """Patches the methods of a config into a model: attention, then linear layers.

    Args:
        model: dense, on its device.
        config, run_dir, training: see ``build_model``.
        started: the run has weights of its own, so that nothing is converted.
        patch_one: patches one method into the model.

    Returns:
        The patch reports.

    Raises:
        PatchError: see ``patch``; names the slot.
    """
    attention = config.attention
    if started and attention is not None:
        attention = stated_attention(config, run_dir, training) or attention
    reports: list[PatchReport] = []
    for method in (attention, config.linear):
        if method is not None:
            try:
                reports.append(patch_one(method.unconverted() if started else method))
            except PatchError as error:
                raise PatchError(f"{slot_of(method).name}: {error}") from None
    return reports


def patched_entries(
    model: nn.Module, config: RunConfig, run_dir: RunDir, started: bool, reports: Sequence[PatchReport]
) -> tuple[AttentionConfig | None, dict[str, Any] | None, tuple[PatchReport, ...]]:
    """Returns ``attention``, ``patch`` and ``reports`` of a ``BuiltModel``; arguments as of ``patch_all``, and its result."""
    record = None if started else patch_record(model)
    attention = config.attention if record is None else record.config
    values = ((run_dir.read_patch() if started else None) or plain_reports(reports)) if reports else None
    return attention, values, () if started else tuple(reports)


def all_parameters(model: nn.Module, dense: tuple[int, int]) -> dict[str, int]:
    """Returns ``params`` of a ``BuiltModel``.

    Args:
        model: patched.
        dense: the numbers of parameters of the model before, see ``count_parameters``.
    """
    total, attention = count_parameters(model)
    return {"total": total, "attention": attention, "dense_total": dense[0], "dense_attention": dense[1]}


def plain_reports(reports: Sequence[PatchReport]) -> dict[str, Any]:
    """Returns patch reports as plain values: the entries of attention's, and those of other slots, each under its name."""
    values = {report.slot: report.to_dict() for report in reports}
    return {**values.pop(ATTENTION.name, {}), **values}
