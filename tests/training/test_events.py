"""TensorBoard's events on a full disk: one warning, no traceback of its thread, and the run goes on."""

import contextlib
import resource
import signal
from pathlib import Path

from tests.training.processes import fork
from vit_tucker.storage.run_dir import log_lines
from vit_tucker.training.events import Events


def write(folder: str, output: str, limit: int) -> None:
    """Write scalars until well after the file may not grow any more."""
    with open(output, "w", buffering=1) as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with log_lines(True):
            events = Events(Path(folder), 1)
            for step in range(3000):
                events.scalar("loss", 0.5, step)
            events.text("text", "text", 1)
            events.close()


def written(folder: Path, limit: int) -> tuple[int | None, str, int]:
    """Exit status and output of ``write``, and how large the events became."""
    process = fork.Process(target=write, args=(str(folder), str(folder) + ".log", limit))
    process.start()
    process.join()
    sizes = [file.stat().st_size for file in folder.glob("events*")] if folder.is_dir() else []
    return process.exitcode, Path(f"{folder}.log").read_text(), sum(sizes)


def test_events_on_a_full_disk_cost_one_warning(tmp_path):
    status, said, size = written(tmp_path / "full", 10_000)
    assert status == 0
    assert said == "TensorBoard's events can't be written, the run goes on: File too large\n"
    assert 0 < size <= 10_000
    assert written(tmp_path / "free", 10_000_000)[:2] == (0, "")
