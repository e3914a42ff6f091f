"""The example of language models: short, offline without arguments, and what it prints."""

import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[2] / "examples" / "language_model.py"


def test_it_is_short_and_halves_the_cache_of_a_tiny_model_offline(monkeypatch, capsys):
    assert len(EXAMPLE.read_text().splitlines()) < 40
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    shown = capsys.readouterr().out
    assert "96 -> 48 (50%)" in shown
    before, after = map(float, re.search(r"perplexity ([\d.]+) before, ([\d.]+) after", shown).groups())
    assert 200 < before < 320  # of 256 bytes, by random weights
    assert 200 < after < 320
