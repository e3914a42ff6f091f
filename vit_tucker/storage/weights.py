"""Weights on disk: one safetensors file each, replaced as a whole, its header says of which model. Nothing is unpickled."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vit_tucker.errors import CheckpointError, one_line

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP2 has spread over processes (all of them must call this); any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has spread a model's parameters over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict of an unwrapped model: whole tensors, keys without the prefixes of torch.compile and checkpoint wrappers.

    All processes must call this if the model is sharded.
    """
    state = {}
    for key, value in model.state_dict().items():
        for wrapper in _WRAPPERS:
            key = key.replace(wrapper, "")
        state[key] = whole(value.detach())
    return state


def save_weights(
    file: Path,
    state: Mapping[str, Tensor],
    metadata: dict[str, str],
    announce: Callable[[Path], None] | None = None,
) -> None:
    """A state dict as one safetensors file, replaced as a whole and on the disk when this returns.

    Args:
        file: where to.
        state: see ``full_state``.
        metadata: strings for the file's header; ``attention`` names the method of a patched model, ``attention_config`` holds
            its options.
        announce: called with the new file, complete and on the disk, right before it gets its name.

    Raises:
        OSError: it can't be written; what was there before still is.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.tmp")
    try:
        write_tensors(beside, state, {"format": "pt", **metadata})
        if announce is not None:
            announce(beside)
        os.replace(beside, file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(file.parent)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Tensors as safetensors, on the disk when this returns; a tensor may share memory with another.

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
    """Write a text file, replaced as a whole and on the disk when this returns."""
    beside = file.with_name(f".{file.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    os.replace(beside, file)


def sync(path: Path) -> None:
    """Have a file's contents, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        reason = one_line(error, 300)
        raise CheckpointError(f"{file}: is of another model: {reason}") from None


def weights_metadata(file: Path) -> dict[str, str]:
    """Header strings of a safetensors file; empty for other formats and plain files.

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
