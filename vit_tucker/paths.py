"""Where results go: asked before the work whose results they are."""

import os
from pathlib import Path

from vit_tucker.errors import ConfigError


def refuse_unwritable(option: str, path: Path, folder: bool = False) -> None:
    """Refuse a place where nothing can be written; nothing is created.

    Args:
        option: what named the place, for the message.
        path: a file to write, or a folder to write into; neither it nor the folders above it need to exist.
        folder: it is a folder.

    Raises:
        ConfigError: something of the wrong kind is there or above it, or it can't be written to.
    """
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
