"""The tensors of a saved model: in memory, in a folder, or in a repository of the hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models._hub import download_from_hf
from torch import Tensor

from vit_tucker.checkpoint.hub import refuse_missing
from vit_tucker.checkpoint.read import read_state
from vit_tucker.errors import CheckpointError, reason_of
from vit_tucker.patching.identity import PATCHED
from vit_tucker.storage.digests import headers_of, verify_beside

WEIGHTS = "model.safetensors"
"""Name of the weights in a folder or repository."""
PICKLED = "pytorch_model.bin"
"""Name of weights that ``timm.models.save_for_hf`` writes unless it is asked for safetensors."""


def read_weights(cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    """Reads the tensors that a pretrained_cfg names; nothing in them is executed.

    They are in memory, in a local folder or file, or on the hub, in any kind of file that timm writes.

    Raises:
        CheckpointError: there are none, they can't be read, or are not those that the config.json beside them names.
    """
    if state := cfg.get("state_dict"):
        if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointError(f"'{PATCHED}': pretrained_cfg.state_dict contains other things than tensors")
        return dict(state)
    if cfg.get("source") == "hf-hub" or (cfg.get("hf_hub_id") and not cfg.get("file")):
        file, local = download_weights(cfg["hf_hub_id"]), False
    elif cfg.get("file"):
        file, local = weights_in(Path(cfg["file"])), True
    else:
        raise CheckpointError(
            f"no weights for '{PATCHED}': name a folder ('local-dir:...') or a repository ('hf-hub:...')"
        )
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    verify_beside(file, siblings=local)
    return read_safetensors(file) if file.suffix == ".safetensors" else read_state(file, "the weights")[0]


def weights_in(path: Path) -> Path:
    """Returns the weights file of a folder that timm has written, safetensors before others; a file as it is."""
    if not path.is_dir():
        return path
    return next((path / name for name in (WEIGHTS, PICKLED) if (path / name).is_file()), path / WEIGHTS)


def download_weights(hub_id: str) -> Path:
    """Returns the weights file of a repository, in the hub's cache; safetensors before others."""
    refuse_missing(hub_id, (WEIGHTS, PICKLED), f"hf-hub:{hub_id}")
    try:
        return download(hub_id, WEIGHTS)
    except CheckpointError as error:
        try:
            return download(hub_id, PICKLED)
        except CheckpointError:
            raise error from None


def download(hub_id: str, name: str) -> Path:
    """Returns a file of a repository, in the hub's cache.

    Raises:
        CheckpointError: no such repository or file, or no connection.
    """
    refuse_missing(hub_id, (name,), f"hf-hub:{hub_id}: {name}")
    try:
        return Path(download_from_hf(hub_id, name))
    except Exception as error:  # the hub's errors derive from several bases, and differ from version to version
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
        raise CheckpointError(f"hf-hub:{hub_id}: {name} can't be downloaded: {reason}") from None


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file by name, on the CPU.

    Raises:
        CheckpointError: it can't be read.
    """
    try:
        return load_file(str(file))
    except (OSError, SafetensorError, KeyError, AttributeError) as error:  # the last two for unknown kinds of numbers
        raise CheckpointError(f"{file}: can't be read: {reason_of(error)}") from None


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors of a safetensors file, from its header."""
    return {name: tuple(shape) for name, (_, shape) in headers_of(file).items()}
