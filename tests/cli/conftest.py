"""Small finished runs that commands work on, each trained once."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, PartialState

from tests.run.tiny import config, trained


def finished(folder: Path, base: str) -> Path:
    """Returns a tiny run on digits below a folder, two epochs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        given = config(base=base)
        trained(given)
    AcceleratorState._reset_state()
    PartialState._reset_state()
    return folder / str(given.output_dir)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run with Tucker Attention."""
    return finished(tmp_path_factory.mktemp("cli"), "digits/tucker_r16")


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a dense run."""
    return finished(tmp_path_factory.mktemp("cli"), "digits/dense")
