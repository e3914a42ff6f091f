"""The table of a sweep, on a terminal and off."""

import io

from vit_tucker.sweep.plan import Job
from vit_tucker.sweep.progress_table import Display
from vit_tucker.sweep.status import State, Status


def make(states, seeds=(0, 1)):
    from vit_tucker.config.load import load_config

    config = load_config("digits/dense", ["train.epochs=8"])
    jobs = [Job(name, seed, config) for seed in seeds for name in dict.fromkeys(name for name, _ in states)]
    return jobs, {job.key: states.get(job.key, Status(State.WAITING)) for job in jobs}


STATES = {
    ("mha", 0): Status(State.DONE, 98.0, 8),
    ("mha", 1): Status(State.DONE, 99.0, 8),
    ("gqa1", 0): Status(State.RUNNING, 97.25, 3),
    ("mla8", 0): Status(State.FAILED, reason="status 1: no luck"),
}


def test_rows_are_cells_and_columns_seeds():
    stream = io.StringIO()
    Display(*make(STATES), stream).close()
    assert [line.split() for line in stream.getvalue().splitlines()[:4]] == [
        ["cell", "seed", "0", "seed", "1", "mean", "top-1", "%"],
        ["mha", "98.00", "99.00", "98.50", "+-", "0.71"],
        ["gqa1", ">3/8", "97.2", "."],
        ["mla8", "FAILED", "."],
    ]


def test_off_a_terminal_only_events_and_the_last_table():
    stream = io.StringIO()
    display = Display(*make(STATES), stream)
    display.draw("")
    assert stream.getvalue() == ""
    display.say("an event")
    display.close()
    text = stream.getvalue()
    assert text.startswith("an event\ncell")
    assert "mla8, seed 0: failed: status 1: no luck" in text
    assert text.endswith("2 done, 1 failed, 1 running, 2 waiting\n")
    assert "\x1b" not in text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_the_table_is_redrawn_in_place_and_events_stay_above_it():
    stream = Terminal()
    with (display := Display(*make(STATES), stream)):
        display.draw("; about 0:01:00 left")
        first = stream.getvalue()
        assert first.splitlines()[0].endswith("cell     seed 0  seed 1   mean top-1 %")
        assert first.splitlines()[-1] == "2 done, 1 failed, 1 running, 2 waiting; about 0:01:00 left"
        display.say("an [event]")
        again = stream.getvalue()[len(first) :]
        assert again.count("\x1b[1A") == 4  # the four lines above the last are erased
        assert again.index("an [event]\n") < again.index("mha")
    display.close()
    assert stream.getvalue().endswith("\n2 done, 1 failed, 1 running, 2 waiting\n")


def test_a_table_higher_than_the_terminal_shows_what_runs(monkeypatch):
    monkeypatch.setenv("LINES", "6")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    with (display := Display(*make(STATES), stream)):
        display.draw("")
        text = stream.getvalue().replace("\x1b[?25l", "")
    assert [line.split()[0] for line in text.splitlines()] == ["cell", "gqa1", "2"]
