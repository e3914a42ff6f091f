"""Checkpoints on disk: safetensors and JSON only, nothing is ever unpickled.

    checkpoints/step-00000123/  model.safetensors [ema.safetensors] optimizer.safetensors state.json   all that a resume needs
    checkpoints/last            symbolic link to the newest of them
    checkpoints/best/           model.safetensors   the weights with the best top-1 (of the EMA where there is one)

A checkpoint is written into a hidden folder and renamed when complete, so that a kill leaves the one before it.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vit_tucker.errors import CheckpointError

_FOLDER = re.compile(r"step-(\d{8,})")


def flatten(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Nested state as JSON values, each tensor replaced by {"tensor": name} and put into ``tensors``.

    Tuples and dtypes are kept as such: a random generator's state (in timm's Kron) must come back as a tuple.

    Raises:
        CheckpointError: a value that is none of these nor JSON.
    """
    if isinstance(value, Tensor):
        tensors[prefix] = value.detach().cpu().contiguous().clone()
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


def save_weights(file: Path, model: nn.Module, metadata: dict[str, str]) -> None:
    """A model's state dict as one safetensors file, replaced as a whole.

    Args:
        file: where to.
        model: unwrapped model; no key prefixes of DDP or torch.compile get in.
        metadata: strings for the file's header; ``attention`` names the method of a patched model, ``attention_config`` holds
            its options.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {k.removeprefix("_orig_mod."): v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    beside = file.with_name(f".{file.name}.tmp")
    save_file(state, str(beside), metadata={"format": "pt", **metadata})
    _sync(beside)
    os.replace(beside, file)


def load_weights(file: Path, model: nn.Module) -> None:
    """Load what ``save_weights`` wrote; every key must match.

    Raises:
        CheckpointError: unreadable, or of another model.
    """
    try:
        state = load_file(str(file))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: can't be read: {error}") from None
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{file}: is of another model: {reason}") from None


def weights_metadata(file: Path) -> dict[str, str]:
    """Header strings of a safetensors file; empty for other formats and plain files."""
    if file.suffix != ".safetensors":
        return {}
    with safe_open(str(file), framework="pt") as opened:
        return opened.metadata() or {}


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    metadata: dict[str, str],
    keep: int,
) -> Path:
    """Write a resumable checkpoint and drop the oldest beyond ``keep``.

    Args:
        folder: the run's checkpoints folder.
        model, ema: unwrapped.
        optimizer: unwrapped.
        progress: JSON values; ``global_step`` names the checkpoint.
        metadata: see ``save_weights``.
        keep: how many to keep.

    Returns:
        The checkpoint's folder.
    """
    final = folder / f"step-{progress['global_step']:08d}"
    beside = folder / f".{final.name}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_weights(beside / "model.safetensors", model, metadata)
    if ema is not None:
        save_weights(beside / "ema.safetensors", ema, metadata)
    tensors: dict[str, Tensor] = {}
    values = flatten(optimizer.state_dict(), "optimizer", tensors)
    save_file(tensors, str(beside / "optimizer.safetensors"))
    (beside / "state.json").write_text(json.dumps({"optimizer": values, "progress": progress}))
    for name in ("optimizer.safetensors", "state.json"):
        _sync(beside / name)
    if final.exists():
        shutil.rmtree(final)
    os.replace(beside, final)
    _link(folder / "last", final.name)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete resumable checkpoints, oldest first."""
    found = [p for p in folder.glob("step-*") if _FOLDER.fullmatch(p.name) and (p / "state.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]))


def load_checkpoint(
    checkpoint: Path, model: nn.Module, ema: nn.Module | None, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore model, EMA and optimizer from a checkpoint folder.

    Returns:
        The ``progress`` that was saved.

    Raises:
        CheckpointError: torn, or of another model or optimizer.
    """
    load_weights(checkpoint / "model.safetensors", model)
    if ema is not None:
        load_weights(checkpoint / "ema.safetensors", ema)
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        tensors = load_file(str(checkpoint / "optimizer.safetensors"))
        optimizer.load_state_dict(unflatten(state["optimizer"], tensors))
        return state["progress"]
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint}: can't be resumed from: {error}") from None


def _sync(path: Path) -> None:
    with open(path, "rb") as opened:
        os.fsync(opened.fileno())


def _link(link: Path, target: str) -> None:
    beside = link.with_name(f".{link.name}.tmp")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target, target_is_directory=True)
    os.replace(beside, link)
