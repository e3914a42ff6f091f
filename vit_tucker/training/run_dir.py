"""The run folder: config.yaml, {patch,classes,results}.json, summary.csv, train.log, TensorBoard events, checkpoints/."""

import csv
import io
import json
import logging
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch

from vit_tucker.data.classes import CLASSES_FILE, classes_text
from vit_tucker.weights import replace_text

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
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """Weights with the best top-1."""
        return self.checkpoints / "best" / "model.safetensors"

    @property
    def teacher(self) -> Path:
        """Weights of the teacher of a run that distils: what it started from need not stay."""
        return self.path / "teacher" / "model.safetensors"

    @property
    def results(self) -> Path:
        """Everything that tables are made of; written when the run is done."""
        return self.path / "results.json"

    @property
    def data_config(self) -> Path:
        """timm's data config of the run: input size, normalisation, interpolation, crop.

        The weights that the run started from may have said it, and need not stay.
        """
        return self.path / "data_config.json"

    def start(
        self,
        config: str,
        patch: dict[str, Any] | None,
        data_config: dict[str, Any],
        classes: Sequence[str] | None = None,
    ) -> None:
        """Write config.yaml, data_config.json, patch.json and classes.json, and send the package's log lines to train.log too."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.results.unlink(missing_ok=True)  # of a finished run that is trained on
        replace_text(self.config, config)
        replace_text(self.data_config, json.dumps(data_config, indent=2) + "\n")
        if patch is not None:
            replace_text(self.path / "patch.json", json.dumps(patch, indent=2) + "\n")
        if classes:
            replace_text(self.path / CLASSES_FILE, classes_text(classes))
        handler = logging.FileHandler(self.path / "train.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        LOGGER.addHandler(handler)

    def read_patch(self) -> dict[str, Any] | None:
        """The patch report of the run's start; None for a dense run."""
        file = self.path / "patch.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def read_data_config(self) -> dict[str, Any] | None:
        """Returns the run's data config: data_config.json, else (older versions) a checkpoint's config.json; None without."""
        if self.data_config.is_file():
            return json.loads(self.data_config.read_text())
        for name in ("last", "best"):
            if (file := self.checkpoints / name / "config.json").is_file():
                return json.loads(file.read_text()).get("pretrained_cfg")
        return None

    def write_summary(self, rows: list[dict[str, Any]]) -> None:
        """Write summary.csv anew from all rows, so that a resumed run has none twice."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        replace_text(self.path / "summary.csv", text.getvalue())

    def log_failure(self, text: str) -> None:
        """Add a line to train.log from any process, if the run had begun."""
        if self.config.is_file():
            stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S,%f")[:-3]
            with (self.path / "train.log").open("a") as log:
                log.write(f"{stamp} {text}\n")

    def write_results(self, results: dict[str, Any]) -> None:
        """Write results.json."""
        replace_text(self.results, json.dumps(results, indent=2) + "\n")


def setup_console(main_process: bool) -> None:
    """Plain log lines on standard output, from the main process only."""
    LOGGER.setLevel(logging.INFO if main_process else logging.ERROR)
    LOGGER.propagate = False
    for handler in LOGGER.handlers[:]:
        LOGGER.removeHandler(handler)
        handler.close()
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.addHandler(console)


def environment() -> dict[str, Any]:
    """Versions and the source commit ('-dirty' with uncommitted changes; None outside a repository)."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "commit": _commit(),
    }


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head
