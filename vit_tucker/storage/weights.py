"""Weights on disk: one safetensors file each, replaced as a whole, with the model in its header. Nothing is unpickled."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vit_tucker.errors import CheckpointError, reason_of

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_forward_module.")
"""Parts of names that torch.compile, activation checkpointing, FSDP and DeepSpeed add anywhere."""


def without_wrappers(name: str) -> str:
    """Returns a tensor's name without what torch's wrappers have added to it.

    Args:
        name: as in a state dict.
    """
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def whole(tensor: Tensor) -> Tensor:
    """Returns the whole of a tensor that FSDP2 has spread over processes; any other as it is.

    All processes must call this.

    Args:
        tensor: (any shape).
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Returns whether FSDP2 has spread a model's parameters over processes.

    Args:
        model: unwrapped.
    """
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict of an unwrapped model: whole tensors, names without those of wrappers.

    All processes must call this if the model is sharded.

    Args:
        model: unwrapped.
    """
    return {without_wrappers(key): whole(value.detach()) for key, value in model.state_dict().items()}


def save_weights(
    file: Path,
    state: Mapping[str, Tensor],
    metadata: dict[str, str],
    before_rename: Callable[[Path], None] | None = None,
) -> None:
    """Writes a state dict as one safetensors file, replaced as a whole and on the disk when this returns.

    Args:
        file: where to.
        state: see ``full_state``.
        metadata: strings for the file's header; ``attention`` names the method of a patched model, ``attention_config`` holds
            its options.
        before_rename: called with the new file, complete and on the disk, right before it gets its name.

    Raises:
        OSError: it can't be written; what was there before still is.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.tmp")
    try:
        write_tensors(beside, state, {"format": "pt", **metadata})
        if before_rename is not None:
            before_rename(beside)
        os.replace(beside, file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(file.parent)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes tensors as safetensors, on the disk when this returns; a tensor may share memory with another.

    Args:
        file: replaced if it is there.
        tensors: by name.
        metadata: strings for the header.

    Raises:
        OSError: it can't be written.
    """
    copies = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    try:
        save_file(copies, str(file), metadata=metadata)
    except SafetensorError as error:  # how safetensors reports a full disk
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is not None:
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from None
        raise OSError(f"{file}: {error}") from None
    sync(file)


def replace_text(file: Path, text: str) -> None:
    """Writes a text file, replaced as a whole and on the disk when this returns.

    Args:
        file: new, or replaced atomically.
        text: its whole contents, written as UTF-8.
    """
    beside = file.with_name(f".{file.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    os.replace(beside, file)


def sync(path: Path) -> None:
    """Waits until a file's contents, or a folder's entries, are on the disk.

    Args:
        path: a file or folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_weights(file: Path, model: nn.Module) -> None:
    """Loads what ``save_weights`` wrote; every key must match.

    Args:
        file: a safetensors file.
        model: changed in place.

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
        raise CheckpointError(f"{file}: is of another model: {reason_of(error, 300)}") from None


def weights_metadata(file: Path) -> dict[str, str]:
    """Returns the header strings of a safetensors file; empty for other formats and plain files.

    Args:
        file: weights in any format.

    Raises:
        CheckpointError: a .safetensors file that can't be read.
    """
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(str(file), framework="pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: can't be read: {error}") from None
