"""Checkpoints on disk: safetensors and JSON only, nothing is ever unpickled.

    checkpoints/step-00000123/  config.json model.safetensors [ema.safetensors] optimizer.safetensors state.json manifest.json
    checkpoints/last            symbolic link to the newest of them
    checkpoints/best/           config.json model.safetensors   the weights with the best top-1 (of the EMA where there is one)

A checkpoint is written into a hidden folder and renamed when it is complete and on the disk, so that a kill, a power cut or a
full disk leaves the one before it. Its manifest holds size and SHA-256 of each file: what was torn or damaged afterwards is
found before it is used.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vit_tucker.errors import CheckpointError
from vit_tucker.weights import load_weights, replace_text, save_weights, sync, whole, write_tensors

_FOLDER = re.compile(r"step-(\d{8,})")
MANIFEST = "manifest.json"


def flatten(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Nested state as JSON values, each tensor replaced by {"tensor": name} and put into ``tensors``.

    Tuples and dtypes are kept as such: a random generator's state (in timm's Kron) must come back as a tuple. All processes
    must call this if tensors are sharded.

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


def unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of ``flatten``."""
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "tuple" in value:
            return tuple(unflatten(v, tensors) for v in value["tuple"])
        if "dtype" in value:
            return getattr(torch, value["dtype"])
        return {k: unflatten(v, tensors) for k, v in value["dict"]}
    return [unflatten(v, tensors) for v in value] if isinstance(value, list) else value


def save_checkpoint(
    folder: Path,
    weights: Mapping[str, Mapping[str, Tensor]],
    optimizer: tuple[Any, Mapping[str, Tensor]],
    progress: dict[str, Any],
    metadata: dict[str, str],
    keep: int,
    description: Mapping[str, Any] | None = None,
) -> Path:
    """Write a resumable checkpoint and drop the oldest beyond ``keep``.

    Args:
        folder: the run's checkpoints folder.
        weights: state dicts by file name: "model", and "ema" where there is one.
        optimizer: its state as ``flatten`` gives it, and the tensors of that.
        progress: JSON values; ``global_step`` names the checkpoint.
        metadata: see ``save_weights``.
        keep: how many to keep.
        description: see ``write_description``.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it can't be written (disk full, ...); the checkpoints before it are all there.
    """
    final = folder / f"step-{progress['global_step']:08d}"
    beside = folder / f".{final.name}.tmp"
    _clear(folder)
    try:
        write_state(beside, weights, optimizer, {"progress": progress}, metadata)
        write_description(beside, description)
        _write(beside / MANIFEST, {f.name: _fingerprint(f) for f in sorted(beside.iterdir())})
        sync(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if final.exists():  # saved at this step already, before its epoch was evaluated
        os.replace(final, folder / f".{final.name}.old")
    os.replace(beside, final)
    _link(folder / "last", final.name)
    sync(folder)
    _clear(folder)
    known = list_checkpoints(folder)
    for old in known[: max(0, known.index(final) + 1 - keep)]:
        _remove(old)
    return final


def write_state(
    folder: Path,
    weights: Mapping[str, Mapping[str, Tensor]],
    optimizer: tuple[Any, Mapping[str, Tensor]],
    facts: dict[str, Any],
    metadata: dict[str, str],
) -> None:
    """Weights, optimizer and facts (JSON values, into state.json) as files of a folder; see ``save_checkpoint``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, state in weights.items():
        save_weights(folder / f"{name}.safetensors", state, metadata)
    values, tensors = optimizer
    write_tensors(folder / "optimizer.safetensors", tensors)
    _write(folder / "state.json", {"optimizer": values, **facts})


def write_description(folder: Path, description: Mapping[str, Any] | None) -> None:
    """What the weights of a folder are of, as config.json of timm's layout: ``vit_tucker.load`` rebuilds the model from it."""
    if description is not None:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "config.json", json.dumps(description, indent=2) + "\n")


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders of resumable checkpoints, oldest first; torn ones too, see ``damage``."""
    found = [p for p in folder.glob("step-*") if _FOLDER.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if all are as they were written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name, written in manifest.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            found = _fingerprint(checkpoint / name)
            if found["bytes"] != written["bytes"]:
                return f"{name} has {found['bytes']:,} bytes of {written['bytes']:,}"
            if found["sha256"] != written["sha256"]:
                return f"{name} is not what was written (SHA-256)"
    except OSError as error:
        return f"{Path(error.filename or MANIFEST).name} can't be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is no manifest"
    return (
        None if {"model.safetensors", "optimizer.safetensors", "state.json"} <= manifest.keys() else "files are missing"
    )


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each damaged one that is newer.

    Returns:
        None and no lines if there are no checkpoints at all.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    _restore(folder)
    checkpoint, damaged = intact_checkpoint(folder)
    if checkpoint is None and damaged:
        raise CheckpointError(
            f"{'; '.join(damaged)}; none is left to continue from; remove the run folder to train anew"
        )
    return checkpoint, damaged


def intact_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """``newest_intact`` of a folder that is only read: nothing is restored or refused.

    Returns:
        None and all lines if none is whole.
    """
    damaged: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        reason = damage(checkpoint)
        if reason is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint}: damaged: {reason}")
    return None, damaged


def load_checkpoint(checkpoint: Path, model: nn.Module, ema: nn.Module | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Restore model and EMA from a checkpoint folder. An EMA that was not saved starts from the model.

    Args:
        checkpoint: see ``newest_intact``.
        model, ema: unwrapped, not yet sharded.

    Returns:
        The ``progress`` that was saved, and the optimizer's state dict, for ``load_optimizer``.

    Raises:
        CheckpointError: torn, or of another model.
    """
    load_weights(checkpoint / "model.safetensors", model)
    if ema is not None:
        saved = checkpoint / "ema.safetensors"
        load_weights(saved if saved.is_file() else checkpoint / "model.safetensors", ema)
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        tensors = load_file(str(checkpoint / "optimizer.safetensors"))
        return state["progress"], unflatten(state["optimizer"], tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}: can't be resumed from: {error}") from None


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer the state that a checkpoint holds; where parameters are sharded, each process takes its part.

    Raises:
        CheckpointError: of another optimizer, or of other parameters.
    """
    names = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        for number, entries in state["state"].items():
            parameter = names[int(number)]
            if isinstance(parameter, DTensor):
                state["state"][number] = {
                    k: distribute_tensor(v.to(parameter.device), parameter.device_mesh, parameter.placements)
                    if isinstance(v, Tensor) and v.shape == parameter.shape
                    else v
                    for k, v in entries.items()
                }
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"the checkpoint's optimizer state is of another optimizer: {error}") from None


def _write(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values))
    sync(file)


def _fingerprint(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _remove(folder: Path) -> None:
    """Renamed first, so that a kill leaves no half of it under its name."""
    hidden = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _restore(folder: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    for old in folder.glob(".step-*.old"):
        if not (final := folder / old.name[1 : -len(".old")]).exists():
            os.replace(old, final)


def _clear(folder: Path) -> None:
    """Remove what kills have left behind."""
    _restore(folder)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _link(link: Path, target: str) -> None:
    beside = link.with_name(f".{link.name}.tmp")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target, target_is_directory=True)
    os.replace(beside, link)
