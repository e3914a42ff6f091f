"""Ensures one writer per run folder, by a lock that the training process takes and that its end releases.

It is a POSIX record lock on ``run.lock``, which network file systems know too. Children don't inherit it: a loader's workers
outlive a killed process by some seconds and hold nothing. It excludes other processes only, so that this process also lists what
it holds. Reading a run (evaluate, explain, tables, ...) needs no lock.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from datetime import datetime, timezone
from pathlib import Path

from vit_tucker.errors import ConfigError, one_line

LOCK_FILE = "run.lock"
TRIES = 3
"""A dry run that only looks holds the lock for an instant."""
TRY_SECONDS = 0.05
_held: set[str] = set()


class RunLock:
    """Locks a run folder for one writer.

    Args:
        folder: of the run; need not be there yet.
        option: what names it, for messages.

    Attributes:
        note: what the user should know: the file system can't lock, or a run of another machine ended without a word.
    """

    def __init__(self, folder: Path, option: str = "output_dir") -> None:
        self.folder, self.file, self.option = folder, folder / LOCK_FILE, option
        self.note: str | None = None
        self._key = os.path.realpath(folder)
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Returns whether this object has the lock."""
        return self._descriptor is not None

    def take(self) -> None:
        """Acquires the lock until ``release`` or this process's end; the folder is made if it is not there.

        Raises:
            ConfigError: another run holds it; host, process and start are named, and nothing has changed.
        """
        if self.held:
            return
        self._refuse_own()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = self._locked(os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX)
        except OSError as error:
            raise ConfigError(f"{self.option}: {self.file} can't be written to: {error.strerror}") from None
        self._descriptor = descriptor
        _held.add(self._key)
        before, host = _owner(descriptor), socket.gethostname()
        if before is not None and before["host"] != host and self.note is None:
            self.note = (
                f"{self.folder}: {_told(before)} left its lock behind, and has ended as far as the file system shows"
            )
        owner = {"host": host, "pid": os.getpid(), "started": datetime.now(timezone.utc).isoformat(" ", "seconds")}
        with contextlib.suppress(OSError):  # a full disk: the lock counts, not who holds it
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(owner).encode(), 0)

    def refuse_held(self) -> None:
        """Raises ConfigError as ``take`` would if another run has the lock; nothing is written."""
        if self.held:
            return
        self._refuse_own()
        with contextlib.suppress(OSError):  # there is none, or it can't be looked at
            os.close(self._locked(os.O_RDONLY, fcntl.LOCK_SH))

    def release(self) -> None:
        """Releases the lock and removes its file."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            self.file.unlink()
        os.close(self._descriptor)
        self._descriptor = None
        _held.discard(self._key)

    def _refuse_own(self) -> None:
        """Raises ConfigError if this process has it already: opening its file again and closing it would release it."""
        if self._key in _held:
            raise ConfigError(self._refusal({"host": socket.gethostname(), "pid": os.getpid(), "started": None}))

    def _locked(self, flags: int, kind: int) -> int:
        """Returns the descriptor of the file, locked; unlocked, with a note, where the file system can't lock."""
        for number in range(TRIES):
            descriptor = os.open(self.file, flags | os.O_CLOEXEC, 0o666)
            try:
                fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    self.note = (
                        f"{self.folder}: its file system can't lock ({error.strerror}): start no second run here"
                    )
                    return descriptor
                owner = _owner(descriptor)
                os.close(descriptor)
                if number == TRIES - 1:
                    raise ConfigError(self._refusal(owner)) from None
                time.sleep(TRY_SECONDS)
                continue
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(self.file), os.fstat(descriptor)):
                    return descriptor
            os.close(descriptor)  # its holder has removed it on leaving
        raise ConfigError(self._refusal(None))

    def _refusal(self, owner: dict[str, object] | None) -> str:
        what = f"{self.option}: {self.folder} is being written by {_told(owner)}"
        return f"{what}; wait for its end, stop it, or choose another folder"


def _told(owner: dict[str, object] | None) -> str:
    """Returns 'process 12 on host, started 2026-01-31 12:00:00+00:00', as far as it is known."""
    if owner is None:
        return "another process"
    started = "" if owner["started"] is None else f", started {owner['started']}"
    return f"process {owner['pid']} on {owner['host']}{started}"


def _owner(descriptor: int) -> dict[str, object] | None:
    """Returns who has written a lock file; None for an empty or foreign one."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return {key: one_line(owner[key], 100) for key in ("host", "pid", "started")}
    except (OSError, ValueError, KeyError, TypeError):
        return None
