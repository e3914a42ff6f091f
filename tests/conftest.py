"""Shared fixtures: small hosts with non-zero biases, in float64 unless a test says otherwise.

Nothing heavy is imported before a fixture needs it: xdist's first process reads this file before it starts the others.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# dozens of processes start in one run: none compiles the sources again, whatever the environment says
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# one thread for each process, those too that tests start: threads of several processes wait for each other in busy loops
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    import torch
    from torch import nn

SIDE_FOLDERS = [
    str(Path(p).resolve())
    for p in os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if p and (Path(p) / "timm").is_dir()
]
"""Where a timm lies that is tested instead of the installed one."""


def pytest_collection_finish() -> None:
    """Takes what the imports have made, hundreds of thousands of objects that stay, out of all later garbage collections."""
    gc.freeze()


def pytest_configure() -> None:
    """Put tests' folders into memory where it has room and may hold programs: a checkpoint waits for a disk dozens of times."""
    if os.access(memory := "/dev/shm", os.W_OK):
        state = os.statvfs(memory)
        if state.f_bavail * state.f_frsize > 4e9 and not state.f_flag & os.ST_NOEXEC:
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", memory)


def process_environment(*folders: Path, **variables: str) -> dict[str, str]:
    """Environment of a process that a test starts: it imports from ``folders`` and has the timm of this process."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    path = [*SIDE_FOLDERS, *map(str, folders)]
    return {**environment, "PYTHONPATH": os.pathsep.join(path)} if path else environment


QUICK = (
    "--quick leaves out tests marked slow, and all but the first case of a parametrised test for each attention method"
)
LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --quick, for the inner loop."""
    parser.addoption("--quick", action="store_true", help=QUICK.partition(" ")[2])


def pytest_sessionstart(session: pytest.Session) -> None:
    """Says at the start what is left out."""
    if session.config.option.quick and not hasattr(session.config, "workerinput"):
        print(QUICK)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Removes what --quick leaves out; each of xdist's processes does so."""
    if not config.option.quick:
        return
    kept: dict[str, pytest.Item] = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            kept.setdefault(quick_case(item), item)
    config.stash[LEFT_OUT] = len(items) - len(kept)
    items[:] = kept.values()


def quick_case(item: pytest.Item) -> str:
    """Returns a test's name with the attention methods among its parameters."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    names = {str(getattr(value, "method", value)) for value in parameters}
    import vit_tucker

    return item.nodeid.partition("[")[0] + str(sorted(names.intersection(vit_tucker.list_methods())))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hands the number of tests left out from xdist's processes to the first one."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes over that number."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Says at the end how many tests were left out."""
    if config.option.quick:
        terminalreporter.write_line(f"{QUICK}: {config.stash.get(LEFT_OUT, 0):,} left out here; ./run.sh test runs all")


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """For whole runs in this process: a folder of their own, and none of Accelerate's state left for the next."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state()
    PartialState._reset_state()


@pytest.fixture
def make_vit() -> Callable[..., nn.Module]:
    """Factory of small random ViTs: 16 tokens and a class token, 4 heads of width 6, 3 blocks."""

    import timm
    import torch

    from tests.reference import randomise

    def make(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
        arguments = {
            "img_size": 16,
            "patch_size": 4,
            "embed_dim": 24,
            "depth": 3,
            "num_heads": 4,
            "num_classes": 7,
            **options,
        }
        model = timm.create_model("vit_tiny_patch16_224", **arguments)
        return randomise(model, seed).to(dtype).eval()

    return make


@pytest.fixture
def images() -> torch.Tensor:
    """(2, 3, 16, 16) float64."""
    import torch

    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
