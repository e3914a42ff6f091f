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

from vit_tucker.errors import CheckpointError
from vit_tucker.storage.digests import CONFIG, read_stored, sha256_of
from vit_tucker.storage.json_files import read_object

_FOLDER = re.compile(r"step-(\d{8,})")
MANIFEST = "manifest.json"
NEEDED = {"model.safetensors", "optimizer.safetensors", "state.json"}


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the folders of resumable checkpoints, oldest first; torn ones too, see ``damage``."""
    found = [p for p in folder.glob("step-*") if _FOLDER.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]))


def damage(checkpoint: Path) -> str | None:
    """Returns what is wrong with the files of a checkpoint; None if they, and no other weights, are as they were written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name, written in manifest.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            found = fingerprint(checkpoint / name)
            if found["bytes"] != written["bytes"]:
                return f"{name} has {found['bytes']:,} bytes of {written['bytes']:,}"
            if found["sha256"] != written["sha256"]:
                return f"{name} is not what was written (SHA-256)"
        if not manifest.keys() >= NEEDED:
            return "files are missing"
        if strange := sorted(f.name for f in checkpoint.glob("*.safetensors") if f.name not in manifest):
            return f"{strange[0]} was not written with the others"
        return contradiction(checkpoint, manifest)
    except OSError as error:
        return f"{Path(error.filename or MANIFEST).name} can't be read: {error.strerror}"
    except CheckpointError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is no manifest"


def contradiction(checkpoint: Path, manifest: Mapping[str, Any]) -> str | None:
    """Returns where config.json and the manifest have other digests of the weights; None if it has none, or the same."""
    if not (checkpoint / CONFIG).is_file():
        return None
    stored = read_stored(read_object(checkpoint / CONFIG), CONFIG)
    for name, file in stored.files.items() if stored is not None else ():
        if name not in manifest:
            return f"{name} is missing: {CONFIG} lists it"
        if manifest[name]["sha256"] != file.sha256:
            return f"{name} is not the file that {CONFIG} lists (SHA-256)"
    return None


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """Returns the newest checkpoint that is whole, and a line for each damaged one that is newer.

    Returns:
        None and no lines if there are no checkpoints at all.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    undo_torn_replacement(folder)
    checkpoint, damaged = intact_checkpoint(folder)
    if checkpoint is None and damaged:
        raise CheckpointError(
            f"{'; '.join(damaged)}; none is left to continue from; remove the run folder to train anew"
        )
    return checkpoint, damaged


def intact_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Returns what ``newest_intact`` does, of a folder that is only read: None and all lines if no checkpoint is whole."""
    damaged: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        reason = damage(checkpoint)
        if reason is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint}: damaged: {reason}")
    return None, damaged


def fingerprint(file: Path) -> dict[str, Any]:
    """Returns what the manifest has of a file: its size and SHA-256."""
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def remove_folder(folder: Path) -> None:
    """Removes a folder; it is renamed first, so that a kill leaves no half of it under its name."""
    hidden = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def undo_torn_replacement(folder: Path) -> None:
    """Undoes a replacement that was killed between its two renames."""
    for old in folder.glob(".step-*.old"):
        if not (final := folder / old.name[1 : -len(".old")]).exists():
            os.replace(old, final)


def clear_leftovers(folder: Path) -> None:
    """Removes what kills have left behind."""
    undo_torn_replacement(folder)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def point_link(link: Path, target: str) -> None:
    """Makes a symbolic link to a folder, or replaces the one that is there, as a whole."""
    beside = link.with_name(f".{link.name}.tmp")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target, target_is_directory=True)
    os.replace(beside, link)
