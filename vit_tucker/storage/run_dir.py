"""The run folder: config.yaml, {patch,classes,results}.json, summary.csv, train.log, TensorBoard events, checkpoints/."""

import contextlib
import csv
import io
import json
import logging
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch

from vit_tucker.storage.checkpoints import list_checkpoints
from vit_tucker.storage.console import Console
from vit_tucker.storage.json_files import checked, read_object
from vit_tucker.storage.run_files import CLASSES_FILE, DataEntries, Patch, Patches, RunData, classes_text
from vit_tucker.storage.weights import replace_text

LOGGER = logging.getLogger("vit_tucker")


@dataclass(frozen=True)
class RunDir:
    """Paths and files of one run. Only the main process writes.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """Returns the file of the resolved config."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Returns the folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """Returns the file of the weights with the best top-1."""
        return self.checkpoints / "best" / "model.safetensors"

    @property
    def teacher(self) -> Path:
        """Returns the file of the teacher's weights of a run that distils: what it started from need not stay."""
        return self.path / "teacher" / "model.safetensors"

    @property
    def results(self) -> Path:
        """Returns the file of all that tables are made of; it is written when the run is done."""
        return self.path / "results.json"

    @property
    def data_config(self) -> Path:
        """Returns the file of timm's data config of the run, since the weights that it started from need not stay."""
        return self.path / "data_config.json"

    @property
    def begun(self) -> bool:
        """Returns whether a run has got as far as its first weights here; what an earlier failure leaves does not count."""
        return self.results.is_file() or self.best.is_file() or bool(list_checkpoints(self.checkpoints))

    @property
    def path_if_begun(self) -> Path | None:
        """Returns the folder if a run has begun in it: only then do its files count."""
        return self.path if self.begun else None

    def start(
        self,
        config: str,
        patch: dict[str, Any] | None,
        data_config: dict[str, Any],
        classes: Sequence[str] | None = None,
    ) -> None:
        """Writes config.yaml, data_config.json, patch.json and classes.json, and sends the package's log lines to train.log too.

        Args:
            config: the YAML text.
            patch: the patch, for patch.json; None for a dense model.
            data_config: how images are prepared, in timm's terms.
            classes: names of the classes in the order of their numbers; None if unknown.

        Raises:
            OSError: they can't be written. A log that can't be is a warning.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.begun:  # of a start that failed, maybe with another config
            for file in (self.path / "patch.json", self.path / CLASSES_FILE):
                file.unlink(missing_ok=True)
        self.results.unlink(missing_ok=True)  # of a finished run that is trained on
        replace_text(self.config, config)
        replace_text(self.data_config, json.dumps(data_config, indent=2) + "\n")
        if patch is not None:
            replace_text(self.path / "patch.json", json.dumps(patch, indent=2) + "\n")
        if classes:
            replace_text(self.path / CLASSES_FILE, classes_text(classes))
        try:
            handler = LogFile(self.path / "train.log")
        except OSError as error:
            warn_of_loss("train.log", error)
            return
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        LOGGER.addHandler(handler)

    def read_patch(self) -> dict[str, Any] | None:
        """Returns the patch report of the run's start; None for a dense run.

        Raises:
            CheckpointError: something else is there.
        """
        file = self.path / "patch.json"
        if not file.is_file():
            return None
        values = read_object(file, all_finite=False)
        checked(Patches if "linear" in values else Patch, values, str(file))
        return values

    def read_data_config(self) -> dict[str, Any] | None:
        """Returns the run's data config: data_config.json, else (older versions) a checkpoint's config.json; None without.

        Raises:
            CheckpointError: something else is there, or only a part of it.
        """
        if self.data_config.is_file():
            values = read_object(self.data_config)
            checked(RunData, values, str(self.data_config))
            return values
        for name in ("last", "best"):
            if (file := self.checkpoints / name / "config.json").is_file():
                values = read_object(file).get("pretrained_cfg") or {}
                checked(DataEntries, values, f"{file}: pretrained_cfg")
                return values
        return None

    def write_summary(self, rows: list[dict[str, Any]]) -> None:
        """Writes summary.csv anew from all ``rows``, so that a resumed run has none twice; a failure is a warning."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        try:
            replace_text(self.path / "summary.csv", text.getvalue())
        except OSError as error:
            warn_of_loss("summary.csv", error)

    def log_failure(self, text: str) -> None:
        """Adds lines of ``text`` to train.log from any process, if the run had begun and if it can be written."""
        if self.config.is_file():
            stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S,%f")[:-3]
            with contextlib.suppress(OSError), (self.path / "train.log").open("a") as log:
                log.write(f"{stamp} {text}\n")

    def write_results(self, results: dict[str, Any]) -> None:
        """Writes ``results`` to results.json, as a whole or not at all."""
        replace_text(self.results, json.dumps(results, indent=2) + "\n")


class LogFile(logging.FileHandler):
    """A log whose lines may get lost, on a full disk for example, at the price of one warning."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Warns of the first line that can't be written; what is no fault of the system is shown as ever."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            warn_of_loss(Path(self.baseFilename).name, error)
        else:
            super().handleError(record)

    def close(self) -> None:
        """Closes the file; lines that are not written yet may be lost too."""
        with contextlib.suppress(OSError):
            super().close()


_lost: set[str] = set()


def warn_of_loss(what: str, error: OSError) -> None:
    """Logs once that something which only shows the run can't be written; the run goes on."""
    if what not in _lost:
        _lost.add(what)
        LOGGER.warning(f"{what} can't be written, the run goes on: {error.strerror or error}")


@contextlib.contextmanager
def log_lines(main_process: bool) -> Iterator[None]:
    """Writes plain log lines to standard output, from the main process only; afterwards the logger is what it was.

    Files that ``RunDir.start`` adds within are closed at the end: what runs in this process later is not this run's.
    """
    _lost.clear()
    before = LOGGER.level, LOGGER.propagate, LOGGER.handlers[:]
    LOGGER.setLevel(logging.INFO if main_process else logging.ERROR)
    LOGGER.propagate = False
    console = Console(sys.stdout)
    console.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.handlers[:] = [console]
    try:
        yield
    finally:
        for handler in LOGGER.handlers:
            handler.close()
        level, LOGGER.propagate, LOGGER.handlers[:] = before
        LOGGER.setLevel(level)


def environment() -> dict[str, Any]:
    """Returns versions and the source commit ('-dirty' with uncommitted changes; None outside a repository)."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "commit": _commit(),
    }


def _commit() -> str | None:
    folder = Path(__file__).resolve().parents[2]
    try:
        head, changed = (
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head
