"""Verified weights, constructors' errors in one line, a check of layers: parts that rebuild models of every library."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vit_tucker.checkpoint.describe import layer_options
from vit_tucker.checkpoint.libraries import ModelPlace
from vit_tucker.checkpoint.tensor_files import WEIGHTS, download
from vit_tucker.errors import CheckpointError, VitTuckerError, reason_of
from vit_tucker.hosts.slot import ATTENTION
from vit_tucker.patching.record import patch_records
from vit_tucker.storage.digests import CONFIG
from vit_tucker.storage.digests import verify as verify_files

LOGGER = logging.getLogger("vit_tucker.checkpoint")


def verified_weights(place: ModelPlace, config: Mapping[str, Any], verify: bool, *names: str) -> tuple[Path, bool]:
    """Returns the weights file of a place, and whether it and config.json are those that were saved.

    Args:
        place: of the model.
        config: its config.json.
        verify: compare them with their digests.
        names: of weights in a folder, the first that is there counts; of a repository the last.

    Raises:
        CheckpointError: there are no weights, or they or config.json have changed.
    """
    file = weights_file(place.folder, *names) if place.folder is not None else download(str(place.hub_id), names[-1])
    verified = verify and verify_files(config, file, place.origin, siblings=place.hub_id is None)
    if verify and not verified and place.hub_id is None:
        LOGGER.warning(
            f"note: {place.origin}: {CONFIG} has no digests (an older vit_tucker or timm wrote it), so whether it or the weights "
            "have changed since can't be seen"
        )
    return file, verified


def weights_file(folder: Path, *names: str) -> Path:
    """Returns the weights of a folder, the first of these names that is there; raises CheckpointError without any."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    pickled = [file.name for pattern in ("*.bin", "*.pth", "*.pt") for file in folder.glob(pattern)]
    advice = "is not read here, since nothing is unpickled: save it as safetensors (safe_serialization=True in timm's functions)"
    hint = f"; {pickled[0]} {advice}" if pickled else ""
    raise CheckpointError(f"{folder}: no {WEIGHTS}{hint}")


def rebuild_model(create_it: Callable[[], nn.Module], origin: str) -> nn.Module:
    """Returns the model that a function makes of a config.json; raises CheckpointError if it can't be built."""
    try:
        return create_it()
    except CheckpointError as error:
        raise CheckpointError(in_one_line(error)) from None
    except VitTuckerError as error:
        raise CheckpointError(f"{origin}: the model can't be built: {in_one_line(error)}") from None
    except Exception as error:  # timm's constructors raise many kinds for arguments that they do not expect
        raise CheckpointError(f"{origin}: the model can't be built: {reason_of(error)}") from None


def in_one_line(error: VitTuckerError) -> str:
    """Returns the message of an error, without the endless names that a config.json may have put into it."""
    text = " ".join(str(error).split())
    return text if len(text) <= 600 else f"{text[:597]}..."


def check_layers(model: nn.Module, config: Mapping[str, Any], origin: str) -> None:
    """Raises CheckpointError if a patched model's layers were built with other options than were stored.

    Args:
        model: rebuilt from the config.
        config: contents of config.json.
        origin: the file, for messages.
    """
    ours = config.get("vit_tucker") or {}
    for slot, record in patch_records(model).items():
        stored = (ours if slot == ATTENTION.name else ours.get(slot) or {}).get("layers")
        built = {} if stored is None else layer_options(model, record.config)
        for name, options in (stored or {}).items():
            if built.get(name) != options:
                raise CheckpointError(
                    f"{origin}: {name} was stored with {options}, but this version builds it with {built.get(name)}"
                )
