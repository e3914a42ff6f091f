"""Checks the contents of state.json of a checkpoint, and that it is of the files beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from vit_tucker.errors import CheckpointError
from vit_tucker.show.measures import TOKEN_MEASURES, measures_in
from vit_tucker.storage.json_files import Strict, checked, kind_of, read_object
from vit_tucker.training.progress import Progress
from vit_tucker.validation.mistakes import shown

Steps = Annotated[int, Field(ge=0, le=1 << 48)]
Percent = Annotated[float, Field(ge=0, le=100)]
Score = Annotated[float, Field(allow_inf_nan=True)]
TermSum = Annotated[list[Score], Field(min_length=2, max_length=2)]
"""Sum of a term of the loss, and number of steps."""
COLUMNS = ("epoch", "train_loss", "eval_loss", "lr")
"""What each row of summary.csv has, beside the measures of its task."""
OPENERS = ("dict", "tensor", "tuple", "dtype")
"""Keys by which ``flatten`` marks what JSON does not have."""


class Best(Strict):
    """Validates the scores of the best weights so far."""

    epoch: Annotated[int, Field(ge=1, le=1 << 48)]
    top1: Percent
    top5: Percent
    loss: Score


class BestTokens(Strict):
    """Validates the scores of the best weights so far of a language model."""

    epoch: Annotated[int, Field(ge=1, le=1 << 48)]
    perplexity: Score
    bits_per_byte: Score | None
    loss: Score


def check_best(values: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError if values are not the scores of the best weights, of whichever task; ``where`` names them."""
    checked(BestTokens if TOKEN_MEASURES[0].name in values else Best, values, where)


class Scaler(Strict):
    """Validates the state of torch's GradScaler."""

    scale: Annotated[float, Field(gt=0)]
    growth_factor: Annotated[float, Field(gt=1)]
    backoff_factor: Annotated[float, Field(gt=0, lt=1)]
    growth_interval: Annotated[int, Field(ge=1)]
    growth_tracker: Annotated[int, Field(ge=0, alias="_growth_tracker")]


class SavedProgress(Strict):
    """Validates ``Progress`` as it is saved, and the scaler's state."""

    epoch: Steps
    step: Steps
    global_step: Steps
    loss_sum: float
    term_sums: dict[str, TermSum] = Field(default={})
    seconds: Annotated[float, Field(ge=0)]
    rows: list[dict[str, Score | None]]
    best: dict[str, Any] | None
    processes: Annotated[int, Field(ge=1, le=1 << 24)]
    steps_per_epoch: Steps
    faults: list[str]
    scaler: Scaler | None = None


def read_progress(values: Any, checkpoint: Path) -> tuple[Progress, dict[str, Any] | None]:
    """Returns where a run stood, and the scaler's state, as a checkpoint has them.

    Args:
        values: the entry ``progress`` of state.json.
        checkpoint: its folder, whose name has the number of steps.

    Raises:
        CheckpointError: something else is there (written by another version?), or numbers that contradict each other.
    """
    where = f"{checkpoint}: state.json: progress"
    checked(SavedProgress, values, where)
    if values["best"] is not None:
        check_best(values["best"], f"{where}: best")
    progress = Progress(**{key: value for key, value in values.items() if key != "scaler"})
    for number, row in enumerate(progress.rows, start=1):
        needed = (*COLUMNS, *(measure.column for measure in measures_in(row)))
        if missing := [name for name in needed if name not in row]:
            raise CheckpointError(f"{where}.rows.{number - 1}: has no {missing[0]}")
        if row["epoch"] != number:
            raise CheckpointError(f"{where}.rows.{number - 1}: epoch {row['epoch']} in the place of epoch {number}")
    for wrong in contradictions(progress, checkpoint):
        raise CheckpointError(f"{where}: {wrong}")
    return progress, values.get("scaler")


def contradictions(progress: Progress, checkpoint: Path) -> list[str]:
    """Returns what can't be true at once of where a run stood, a line each."""
    p, found = progress, []
    if f"step-{p.global_step:08d}" != checkpoint.resolve().name:
        found.append(f"global_step is {p.global_step}, in the folder {checkpoint.resolve().name}")
    if p.steps_per_epoch and (p.step > p.steps_per_epoch or p.global_step != p.epoch * p.steps_per_epoch + p.step):
        found.append(
            f"{p.epoch} epochs of {p.steps_per_epoch} steps and {p.step} steps are not the {p.global_step} of global_step"
        )
    if len(p.rows) != p.epoch:
        found.append(f"{len(p.rows)} rows for {p.epoch} epochs")
    if p.best is not None and p.best["epoch"] > p.epoch + 1:
        found.append(f"the best epoch is {p.best['epoch']}, after {p.epoch} epochs")
    return found


class SavedState(NamedTuple):
    """The contents of state.json and optimizer.safetensors of a checkpoint.

    Attributes:
        progress: JSON values, for ``read_progress``.
        optimizer: state dict, for ``optimizer_state.load_optimizer``.
        step_rule: ``name`` and ``state`` of the rule of the run, for ``step.restore_rule``; None if it had none of its own.
    """

    progress: dict[str, Any]
    optimizer: dict[str, Any]
    step_rule: dict[str, Any] | None


def read_training_state(checkpoint: Path, tensors: Mapping[str, Tensor]) -> SavedState:
    """Returns the contents of a checkpoint's state.json, with the tensors in their places.

    Raises:
        CheckpointError: it holds something else.
    """
    state = read_object(checkpoint / "state.json", all_finite=False)
    for key in ("progress", "optimizer"):
        if not isinstance(state.get(key), dict):
            raise CheckpointError(f"{key}: an object is needed, a {kind_of(state.get(key))} found")
    nested = {key: state[key] for key in ("optimizer", "step_rule") if key in state}
    try:
        found = {key: unflatten(value, tensors, key) for key, value in nested.items()}
    except RecursionError:
        raise CheckpointError("optimizer: is nested too deep") from None
    lost = sorted(tensors.keys() - {name for value in nested.values() for name in names_in(value)})
    if lost:
        raise CheckpointError(f"optimizer: {lost[0]} of optimizer.safetensors has no place in it")
    rule = found.get("step_rule")
    if "step_rule" in nested and not (isinstance(rule, dict) and rule.keys() == {"name", "state"}):
        raise CheckpointError(f"step_rule: {shown(rule)} found, its name and state needed")
    if rule is not None and not (isinstance(rule["name"], str) and isinstance(rule["state"], dict)):
        raise CheckpointError("step_rule: a name that is text, and a state that is an object, are needed")
    return SavedState(state["progress"], found["optimizer"], rule)


def unflatten(value: Any, tensors: Mapping[str, Tensor], place: str) -> Any:
    """Restores nested state from JSON values, the inverse of ``vit_tucker.training.state.flatten``.

    Args:
        value: as ``flatten`` returned it.
        tensors: by name.
        place: name of the value, for messages and tensors.

    Raises:
        CheckpointError: something that ``flatten`` does not make.
    """
    if isinstance(value, list):
        return [unflatten(v, tensors, f"{place}.{i}") for i, v in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or (kind := next(iter(value))) not in OPENERS:
        raise CheckpointError(f"{place}: {shown(list(value))} where one of {', '.join(OPENERS)} is needed")
    inner = value[kind]
    if kind == "tensor":
        if inner != place or place not in tensors:
            raise CheckpointError(f"{place}: has no such tensor in optimizer.safetensors, or names another")
        return tensors[place]
    if kind == "dtype":
        found = getattr(torch, inner, None) if isinstance(inner, str) else None
        if not isinstance(found, torch.dtype):
            raise CheckpointError(f"{place}: {shown(inner)} is no dtype")
        return found
    if not isinstance(inner, list):
        raise CheckpointError(f"{place}: a {kind_of(inner)} found, a list needed")
    if kind == "tuple":
        return tuple(unflatten(v, tensors, f"{place}.{i}") for i, v in enumerate(inner))
    pairs = {}
    for pair in inner:
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in (str, int) or pair[0] in pairs:
            raise CheckpointError(f"{place}: {shown(pair)} found, a pair of a new name and a value needed")
        pairs[pair[0]] = unflatten(pair[1], tensors, f"{place}.{pair[0]}")
    return pairs


def names_in(value: Any) -> list[str]:
    """Returns the names of all tensors in what ``flatten`` has made."""
    if isinstance(value, dict):
        return [value["tensor"]] if "tensor" in value else [n for part in value.values() for n in names_in(part)]
    return [name for part in value for name in names_in(part)] if isinstance(value, list) else []
