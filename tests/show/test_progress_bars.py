"""Progress bars: where somebody looks, and never for programs."""

import io
from contextlib import redirect_stderr

import pytest

from vit_tucker.show.progress_bars import each, progress_bar, showing_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


either = pytest.mark.parametrize("stream", [Terminal, io.StringIO], ids=["terminal", "pipe"])


def hidden() -> bool:
    """Whether a bar of two layers is."""
    with progress_bar(total=2, unit="layers") as bar:
        return bool(bar.disable)


def wiped(text: str) -> bool:
    """Whether nothing of the bars is left on the screen."""
    return all(not line.rpartition("\r")[0].rpartition("\r")[2].strip() for line in text.split("\n"))


@either
def test_a_bar_is_for_terminals(stream):
    with redirect_stderr(stream()) as shown:
        assert hidden() == (stream is not Terminal)
        with showing_progress(False):
            assert hidden()
            with showing_progress(None):
                assert hidden()
    assert wiped(shown.getvalue())


@either
def test_one_that_is_asked_for_is_shown_and_names_the_item(stream):
    with redirect_stderr(stream()) as shown, showing_progress(True), showing_progress(None):
        assert list(each(["a", "b"], "converting", "layers", str)) == ["a", "b"]
    text = shown.getvalue()
    assert "converting a:   0%" in text
    assert "converting b:  50%" in text
    assert "1/2" in text
    assert wiped(text)


@pytest.mark.parametrize(("value", "off"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_the_environment_switches_all_off(monkeypatch, value, off):
    monkeypatch.setenv("TQDM_DISABLE", value)
    with redirect_stderr(Terminal()), showing_progress(True):
        assert hidden() == off


@either
def test_an_error_inside_leaves_the_state_as_it_was(stream):
    with redirect_stderr(stream()):
        with pytest.raises(ZeroDivisionError), showing_progress(True):
            [1 / number for number in each([0], "dividing", "numbers", str)]
        assert hidden() == (stream is not Terminal)
