"""`vit-tucker info`, as people and as machines read it."""

import json
import sys

import pytest

from vit_tucker.cli import main
from vit_tucker.cli.info import as_text, device_text, extra_text
from vit_tucker.version import __version__


def test_text_has_every_part(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for title in ("versions:", "extras:", "platform:", "devices:", "attention backends:", 'backend "auto" chooses:'):
        assert title in text.splitlines()
    assert f"  vit_tucker       {__version__}" in text.splitlines()
    assert "not available: it is for CUDA" in text


def test_json_has_every_part(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"versions", "extras", "platform", "devices", "backends", "auto", "problems"}
    assert found["devices"][0]["device"] == "cpu"


def test_a_broken_torch_is_listed_and_the_status_is_0(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "versions:" in text
    assert "problems:" in text
    assert "\ndevices:" not in text
    assert "import of torch halted" in text


def test_nothing_known_is_still_a_report():
    parts = ("versions", "extras", "platform", "devices", "backends", "auto")
    assert as_text({**dict.fromkeys(parts), "problems": {"versions": "x"}}) == "problems:\n  versions  x"


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"device": "cuda", "missing": "no driver"}, "none: no driver"),
        ({"device": "mps", "name": "Apple GPU"}, "Apple GPU"),
        (
            {"device": "cuda:0", "name": "A GPU", "memory_bytes": 2**34, "capabilities": ["CUDA 12.6", "compute 9.0"]},
            "A GPU, 16.0 GiB, CUDA 12.6, compute 9.0",
        ),
        (
            {"device": "cpu", "name": "A CPU", "cores": 2, "threads": 1, "memory_bytes": None, "capabilities": ["AMX"]},
            "A CPU, 2 cores, torch uses 1 thread(s), AMX",
        ),
    ],
)
def test_devices_in_words(entry, text):
    assert device_text(entry) == text


def test_extras_in_words():
    assert extra_text("onnx", {"onnx": "1.0"}) == "installed"
    assert extra_text("onnx", {"onnx": None, "x": "1"}) == "missing onnx: pip install 'vit_tucker[onnx]'"


def test_a_mistake_is_one_line(capsys):
    assert main(["info", "--jsn"]) == 2
    assert "unrecognized arguments: --jsn" in capsys.readouterr().err
