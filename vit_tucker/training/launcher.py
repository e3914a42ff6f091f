"""Workers don't outlive their launcher: torchrun or accelerate launch, killed by SIGKILL, can't stop them itself."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vit_tucker.storage.run_dir import LOGGER

POLL_SECONDS = 1.0
GRACE_SECONDS = 30.0
"""How long a worker may take to save its state; then it may be waiting for another that is gone. torchrun has the same."""


def launcher_process(environment: Mapping[str, str] = os.environ) -> int | None:
    """Returns the process that started this one as a worker; None if none did: the shell that a run was started from may end.

    torchrun, and accelerate launch for several processes, name themselves in the environment. For one process accelerate sets
    only what a shell may have set too, so that the parent's command line decides.
    """
    parent = os.getppid()
    if parent == 1:  # a container's first process: nothing outlives it
        return None
    if "TORCHELASTIC_RUN_ID" in environment:
        return parent
    if any(name.startswith("ACCELERATE_") for name in environment):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace").split("\0")
            names = [Path(word).name for word in words[:4]]
            known = ("accelerate", "accelerate-launch", "vit_tucker.cli.launch")
            if any(name in known or name.startswith("accelerate.") for name in names):
                return parent
    return None


@contextmanager
def leaving_with_launcher(
    launcher: int | None, poll_seconds: float = POLL_SECONDS, grace_seconds: float = GRACE_SECONDS
) -> Iterator[None]:
    """Sends this process SIGTERM when its launcher is gone, and ends it the hard way if it is still there after a while.

    Args:
        launcher: see ``launcher_process``; None for none.
        poll_seconds: between two checks of the parent.
        grace_seconds: from SIGTERM, which saves the state of a training run, to the end.
    """
    left = threading.Event()

    def check_launcher() -> None:
        while os.getppid() == launcher:
            if left.wait(poll_seconds):
                return
        LOGGER.warning(f"the launcher (process {launcher}) is gone: stopping")
        os.kill(os.getpid(), signal.SIGTERM)
        if not left.wait(grace_seconds):
            os._exit(128 + signal.SIGTERM)

    if launcher is not None:
        threading.Thread(target=check_launcher, name="launcher watch", daemon=True).start()
    try:
        yield
    finally:
        left.set()
