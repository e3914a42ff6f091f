"""A run's state as files: weights, optimizer and progress into a checkpoint, and back."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vit_tucker.errors import CheckpointError, one_line
from vit_tucker.storage.checkpoints import (
    MANIFEST,
    clear_leftovers,
    fingerprint,
    list_checkpoints,
    point_link,
    remove_folder,
)
from vit_tucker.storage.digests import CONFIG, stored_file, with_stored, write_config
from vit_tucker.storage.weights import load_weights, save_weights, sync, whole, write_tensors
from vit_tucker.training.saved_state import SavedState, read_training_state


def flatten(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Converts nested state to JSON values; each tensor is replaced by {"tensor": name} and put into ``tensors``.

    Tuples and dtypes are kept as such: a random generator's state (in timm's Kron) must come back as a tuple. All processes
    must call this if tensors are sharded.

    Args:
        value: nested state.
        prefix: name of the value, which tensors in it start with.
        tensors: filled, by name.

    Raises:
        CheckpointError: a value that is none of these nor JSON.
    """
    if isinstance(value, Tensor):
        tensors[prefix] = whole(value.detach())
        return {"tensor": prefix}
    if isinstance(value, Mapping):
        return {"dict": [[k, flatten(v, f"{prefix}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [flatten(v, f"{prefix}.{i}", tensors) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"{prefix}: a {type(value).__name__} can't be saved")


def save_checkpoint(
    folder: Path,
    weights: Mapping[str, Mapping[str, Tensor]],
    optimizer: tuple[Any, Mapping[str, Tensor]],
    progress: dict[str, Any],
    metadata: dict[str, str],
    keep: int,
    description: Mapping[str, Any] | None = None,
    step_rule: Any = None,
) -> Path:
    """Writes a resumable checkpoint and drops the oldest beyond ``keep``.

    Args:
        folder: the run's checkpoints folder.
        weights: state dicts by file name: "model", and "ema" where there is one.
        optimizer: its state as ``flatten`` gives it, and the tensors of that.
        progress: JSON values; ``global_step`` names the checkpoint.
        metadata: see ``save_weights``.
        keep: how many to keep.
        description: config.json, from which ``vit_tucker.load`` rebuilds the model; none is written if None.
        step_rule: its name and state as ``flatten`` gives them, their tensors among those of the optimizer; None for none.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it can't be written (disk full, ...); the checkpoints before it are all there.
    """
    final = folder / f"step-{progress['global_step']:08d}"
    beside = folder / f".{final.name}.tmp"
    clear_leftovers(folder)
    try:
        facts = {"progress": progress} | ({} if step_rule is None else {"step_rule": step_rule})
        write_state(beside, weights, optimizer, facts, metadata)
        written = {f.name: fingerprint(f) for f in sorted(beside.iterdir())}
        if description is not None:
            files = {f"{name}.safetensors": written[f"{name}.safetensors"]["sha256"] for name in weights}
            write_config(beside, with_stored(description, {n: stored_file(beside / n, d) for n, d in files.items()}))
            written[CONFIG] = fingerprint(beside / CONFIG)
        _write(beside / MANIFEST, written)
        sync(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if final.exists():  # saved at this step already, before its epoch was evaluated
        os.replace(final, folder / f".{final.name}.old")
    os.replace(beside, final)
    point_link(folder / "last", final.name)
    sync(folder)
    clear_leftovers(folder)
    known = list_checkpoints(folder)
    for old in known[: max(0, known.index(final) + 1 - keep)]:
        remove_folder(old)
    return final


def write_state(
    folder: Path,
    weights: Mapping[str, Mapping[str, Tensor]],
    optimizer: tuple[Any, Mapping[str, Tensor]],
    facts: dict[str, Any],
    metadata: dict[str, str],
) -> None:
    """Writes weights, optimizer and facts as files of a folder, see ``save_checkpoint``.

    Args:
        folder: made if missing.
        weights: state dicts by file name: "model", and "ema" where there is one.
        optimizer: its state as ``flatten`` returns it, and the tensors of that.
        facts: JSON values for state.json.
        metadata: header of the weights files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, state in weights.items():
        save_weights(folder / f"{name}.safetensors", state, metadata)
    values, tensors = optimizer
    write_tensors(folder / "optimizer.safetensors", tensors)
    _write(folder / "state.json", {"optimizer": values, **facts})


def load_checkpoint(checkpoint: Path, model: nn.Module, ema: nn.Module | None) -> SavedState:
    """Restores model and EMA from a checkpoint folder. An EMA that was not saved starts from the model.

    Args:
        checkpoint: see ``newest_intact``.
        model, ema: unwrapped, not yet sharded.

    Returns:
        The rest of what was saved.

    Raises:
        CheckpointError: torn, or of another model.
    """
    load_weights(checkpoint / "model.safetensors", model)
    if ema is not None:
        saved = checkpoint / "ema.safetensors"
        load_weights(saved if saved.is_file() else checkpoint / "model.safetensors", ema)
    try:
        return read_training_state(checkpoint, load_file(str(checkpoint / "optimizer.safetensors")))
    except (OSError, SafetensorError, CheckpointError) as error:
        reason = one_line(error).removeprefix(f"{checkpoint}/")
        raise CheckpointError(f"{checkpoint}: can't be resumed from: {reason}") from None


def _write(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values))
    sync(file)
