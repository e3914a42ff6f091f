"""What run.sh installs: the package once, and what a command needs besides when it is first called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # processes, though short ones

ROOT = Path(__file__).parents[1]
STAND_IN = '#!/bin/bash\necho "$(basename "$0")" "$@" >>"$LOG"\n'


@pytest.fixture
def checkout(tmp_path):
    """A copy of run.sh whose python only notes what it was called with."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "vit-tucker"):
        file = tmp_path / ".venv" / "bin" / name
        file.write_text(STAND_IN)
        file.chmod(0o755)
    for name in ("run.sh", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def call(checkout: Path, *arguments: str) -> list[str]:
    """Runs run.sh; returns what was installed ('.' or '.[onnx]'), and what ran then."""
    log = checkout / "log"
    log.write_text("")
    command = ["bash", str(checkout / "run.sh"), *arguments]
    subprocess.run(command, env={**os.environ, "LOG": str(log)}, check=True, capture_output=True)
    lines = log.read_text().splitlines()
    return [line.rpartition(" ")[2] if "pip install" in line else line for line in lines]


@pytest.mark.parametrize(
    ("arguments", "installed"),
    [
        ("plan vit_tiny_patch16_224", "."),
        ("export runs/a", ".[onnx]"),
        ("export runs/a --format onnx --int8", ".[onnx]"),
        ("export runs/a --format dense", "."),
        ("export runs/a --format=torch_export", "."),
        ("export runs/a --dense", ".[onnx]"),
        ("export --help", "."),
        ("convert --cfg x data.dataset=wds/birds", ".[data]"),
        ("evaluate runs/a --data hfds/birds", ".[data]"),
        ("export runs/a --data hfds/birds", ".[onnx,data]"),
        ("export wards/a --format dense", "."),
        ("perplexity runs/a --text b.txt", ".[hf]"),
        ("hosts --library transformers", ".[hf]"),
        ("hosts --filter vit_*", "."),
        ("cost hf:gpt2", ".[hf]"),
    ],
)
def test_a_command_installs_what_it_needs(checkout, arguments, installed):
    first, then = call(checkout, *arguments.split())
    assert first == installed
    assert then == f"vit-tucker {arguments}"
    assert call(checkout, *arguments.split()) == [then]  # once


@pytest.mark.parametrize(
    "arguments", ["--cfg a --executor slurm", "--cfg a executor.kind=slurm", "--cfg sweeps/slurm_imagenet"]
)
def test_a_sweep_on_a_cluster_installs_submitit(checkout, arguments):
    assert call(checkout, "sweep", *arguments.split())[0] == ".[slurm]"
    assert call(checkout, "sweep", "--cfg", "a") == ["python experiments/sweep.py --cfg a"]


def test_what_is_there_is_not_installed_again(checkout):
    assert call(checkout, "setup", "onnx") == [".[onnx]"]
    assert call(checkout, "plan", "a") == ["vit-tucker plan a"]  # an extra brings the package
    assert call(checkout, "setup", "data") == [".[data]"]
    assert call(checkout, "test")[0] == ".[test]"
    assert call(checkout, "setup", "slurm") == []  # the tests' extra has it
    with (checkout / "setup.cfg").open("a") as file:
        file.write("\n")
    assert call(checkout, "export", "a")[0] == ".[onnx]"  # of another state
