"""Paths that users name: how messages show them, which are allowed, and whether results can be written there."""

import os
import unicodedata
from pathlib import Path

from vit_tucker.errors import ConfigError

MAX_NAME, MAX_PATH = 255, 4095
"""Bytes that Linux and other systems take for a file's name, and for a whole path."""


def displayed(path: Path) -> Path:
    """Returns a path as messages name it: relative to the current folder where it lies below it."""
    place = Path(os.path.abspath(path))
    return place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else path


def checked_path(text: str) -> str:
    """Returns a path as it is.

    Raises:
        ValueError: it has control characters, or is longer than file systems take; one line.
    """
    if bad := next((char for char in text if unicodedata.category(char) in ("Cc", "Zl", "Zp")), None):
        raise ValueError(f"a path can't have the character {bad!r} in it: {text!r:.80}")
    if long := next((part for part in Path(text).parts if len(os.fsencode(part)) > MAX_NAME), None):
        raise ValueError(
            f"a name of {len(os.fsencode(long))} bytes in a path, and file systems allow {MAX_NAME}: {long!r:.40}..."
        )
    if len(os.fsencode(text)) > MAX_PATH:
        raise ValueError(
            f"a path of {len(os.fsencode(text))} bytes, and file systems allow {MAX_PATH}: {text!r:.40}..."
        )
    return text


def checked_name(text: str) -> str:
    """Returns what names a folder inside another: one name, or several with '/' between them.

    Raises:
        ValueError: see ``checked_path``; or it is empty, absolute, or leads out by '..'; one line.
    """
    checked_path(text)
    if not all(part not in ("", ".", "..") for part in text.split("/")):
        raise ValueError(f"{text!r} names no folder inside another: no '..', no '.', no '/' at either end")
    return text


def refuse_unwritable(option: str, path: Path, folder: bool = False) -> None:
    """Refuses a place where nothing can be written; nothing is created.

    Args:
        option: what named the place, for the message.
        path: a file to write, or a folder to write into; neither it nor the folders above it need to exist.
        folder: it is a folder.

    Raises:
        ConfigError: something of the wrong kind is there or above it, it can't be written to, or it is no path.
    """
    try:
        checked_path(str(path))
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
    path = path.absolute()
    if not folder and path.is_dir():
        raise ConfigError(f"{option}: {path} is a folder; name a file")
    above = path if folder else path.parent
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise ConfigError(f"{option}: {above} is a file; name {'another folder' if folder else 'a file elsewhere'}")
    written = path if path.exists() else above
    if not os.access(written, os.W_OK):
        raise ConfigError(f"{option}: {written} can't be written to")
