"""Checkpoints on disk: safetensors and JSON only, nothing is ever unpickled.

    checkpoints/step-00000123/  config.json model.safetensors [ema.safetensors] optimizer.safetensors state.json manifest.json
    checkpoints/last            symbolic link to the newest of them
    checkpoints/best/           config.json model.safetensors   the weights with the best top-1 (of the EMA where there is one)

A checkpoint is written into a hidden folder and renamed when it is complete and on the disk, so that a kill, a power cut or a
full disk leaves the one before it. Its manifest holds size and SHA-256 of each file: what was torn or damaged afterwards is
found before it is used.
"""

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

from vit_tucker.digests import CONFIG, read_stored, sha256_of, stored_file, with_stored, write_config
from vit_tucker.errors import CheckpointError
from vit_tucker.json_files import read_object
from vit_tucker.training.saved_state import read_state
from vit_tucker.weights import load_weights, save_weights, sync, whole, write_tensors

_FOLDER = re.compile(r"step-(\d{8,})")
MANIFEST = "manifest.json"
NEEDED = {"model.safetensors", "optimizer.safetensors", "state.json"}


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
        description: config.json, from which ``vit_tucker.load`` rebuilds the model; none is written if None.

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
        written = {f.name: _fingerprint(f) for f in sorted(beside.iterdir())}
        if description is not None:
            files = {f"{name}.safetensors": written[f"{name}.safetensors"]["sha256"] for name in weights}
            write_config(beside, with_stored(description, {n: stored_file(beside / n, d) for n, d in files.items()}))
            written[CONFIG] = _fingerprint(beside / CONFIG)
        _write(beside / MANIFEST, written)
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


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders of resumable checkpoints, oldest first; torn ones too, see ``damage``."""
    found = [p for p in folder.glob("step-*") if _FOLDER.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if all are as they were written, and no weights are there besides."""
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
        if not manifest.keys() >= NEEDED:
            return "files are missing"
        if strange := sorted(f.name for f in checkpoint.glob("*.safetensors") if f.name not in manifest):
            return f"{strange[0]} was not written with the others"
        return weights_told_otherwise(checkpoint, manifest)
    except OSError as error:
        return f"{Path(error.filename or MANIFEST).name} can't be read: {error.strerror}"
    except CheckpointError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is no manifest"


def weights_told_otherwise(checkpoint: Path, manifest: Mapping[str, Any]) -> str | None:
    """Which weights config.json and the manifest tell apart; None if they agree, or config.json says nothing.

    Raises:
        CheckpointError: config.json can't be read.
    """
    if not (checkpoint / CONFIG).is_file():
        return None
    stored = read_stored(read_object(checkpoint / CONFIG), CONFIG)
    for name, file in stored.files.items() if stored is not None else ():
        if name not in manifest:
            return f"{name} is missing: {CONFIG} tells of it"
        if manifest[name]["sha256"] != file.sha256:
            return f"{name} is not what {CONFIG} tells of (SHA-256)"
    return None


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
        The ``progress`` that was saved, and the optimizer's state dict, for ``optimizer_state.load_optimizer``.

    Raises:
        CheckpointError: torn, or of another model.
    """
    load_weights(checkpoint / "model.safetensors", model)
    if ema is not None:
        saved = checkpoint / "ema.safetensors"
        load_weights(saved if saved.is_file() else checkpoint / "model.safetensors", ema)
    try:
        return read_state(checkpoint, load_file(str(checkpoint / "optimizer.safetensors")))
    except (OSError, SafetensorError, CheckpointError) as error:
        reason = " ".join(str(error).split()).removeprefix(f"{checkpoint}/")
        raise CheckpointError(f"{checkpoint}: can't be resumed from: {reason}") from None


def _write(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values))
    sync(file)


def _fingerprint(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


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
