"""The contract tests as `./run.sh test -p mymethod tests/contract` runs them, for methods of a user's own."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vit_tucker.attention import registry

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PLUGIN = """
from typing import Literal
import vit_tucker
from vit_tucker.attention.variants.mha import MHA, MHAConfig

class Layer(MHA):
    def mix(self, x, attn_mask=None, is_causal=False, rope=None):
        {body}

@vit_tucker.register_method("{name}")
class Config(MHAConfig):
    method: Literal["{name}"] = "{name}"
    carries = frozenset({carries})

    def build(self, spec, **factory):
        assert self.carries.issuperset(spec.features)
        return Layer(spec, **factory)
"""
LIMITED = PLUGIN.format(
    name="limited_heads",
    carries=["position_bias", "layout"],
    body="assert rope is None; return super().mix(x, attn_mask, is_causal)",
)
CLAIMING = PLUGIN.format(
    name="claiming_heads",
    carries=["position_bias", "layout", "rope", "qk_norm", "scale_norm", "gate"],
    body="return super().mix(x, attn_mask, is_causal)  # forgets the rotations",
)


class Collected:
    """A plugin of pytest that notes how each test ends."""

    def __init__(self) -> None:
        self.ends: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome == "failed":
            self.ends.setdefault(report.outcome, []).append(report.nodeid.rpartition("::")[2])


@pytest.fixture
def contract(tmp_path, monkeypatch):
    """Runs the contract tests of a plug-in, in this process, from copies: this module's twins are imported already."""
    monkeypatch.syspath_prepend(tmp_path)
    known = dict(registry.METHODS.entries)
    registry.METHODS.entries.clear()  # so that only the plug-in's tests are collected

    def run(name: str, code: str, only: str = "") -> dict[str, list[str]]:
        (tmp_path / f"{name}.py").write_text(code)
        files = []
        for test in ("test_layer_contract", "test_features"):
            files.append(str(tmp_path / f"{test}_{name}.py"))
            shutil.copyfile(Path(__file__).with_name(f"{test}.py"), files[-1])
        collected = Collected()
        options = [
            "-q",
            "--tb=line",
            "-p",
            name,
            "-k",
            only,
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            f"--rootdir={tmp_path}",
        ]
        pytest.main([*options, *files], plugins=[collected])
        return collected.ends

    yield run
    registry.METHODS.entries.clear()
    registry.METHODS.entries.update(known)


def test_a_method_without_rope_passes_and_hosts_with_it_are_refused(contract, capsys):
    ends = contract("limited_heads", LIMITED, "timm or rope or features")
    assert "failed" not in ends, capsys.readouterr().out
    passed = ends["passed"]
    assert "test_features_are_carried_exactly_or_refused[limited_heads-rope]" in passed
    assert "test_full_rank_conversion_is_exact[limited_heads-timm]" in passed
    assert not any("rope" in test for test in passed if "_refused" not in test)


def test_a_method_that_claims_rope_and_forgets_it_fails(contract):
    ends = contract("claiming_heads", CLAIMING, "exact and (timm or rope)")
    assert "test_features_are_carried_exactly_or_refused[claiming_heads-rope]" in ends["failed"]
    assert "test_full_rank_conversion_is_exact[claiming_heads-rope]" in ends["failed"]
    assert "test_full_rank_conversion_is_exact[claiming_heads-timm]" in ends["passed"]


@pytest.mark.parametrize("given", ["mymethod", "mymethod.py", "here/mymethod.py", "{folder}/here/mymethod.py"])
def test_run_sh_finds_the_file_where_it_was_called(tmp_path, given):
    checkout, mine = tmp_path / "checkout", tmp_path / "mine"
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (mine / "here").mkdir(parents=True)
    python = checkout / ".venv" / "bin" / "python"
    python.write_text('#!/bin/bash\n[ "$2" = pip ] || { printf "%s\\n" "$PYTHONPATH" "$@"; }\n')
    python.chmod(0o755)
    for name in ("run.sh", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, checkout)
    folder = mine / "here" if "here" in given else mine
    (folder / "mymethod.py").write_text("")
    command = ["bash", str(checkout / "run.sh"), "test", "-p", given.format(folder=mine), "tests/contract", "-x"]
    environment = {**os.environ, "PYTHONPATH": "before"}
    out = subprocess.run(command, cwd=mine, env=environment, check=True, capture_output=True, text=True).stdout
    path, *arguments = out.splitlines()
    assert str(folder) in path.split(":")
    assert path.split(":")[-1] == "before"
    assert arguments[-4:] == ["-p", "mymethod", "tests/contract", "-x"]
