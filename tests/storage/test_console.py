"""Lines of a run where progress bars are shown too."""

import io
import logging
from contextlib import redirect_stderr, redirect_stdout

from tqdm import tqdm

from vit_tucker.storage.console import Console


def test_lines_of_the_log_stand_above_a_progress_bar():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    with redirect_stdout(screen), redirect_stderr(screen):
        console = Console(screen)
        with tqdm(total=2, desc="epoch", leave=False) as bar:
            bar.update()
            console.emit(logging.LogRecord("vit_tucker", logging.INFO, "", 0, "a line", None, None))
    before, after = screen.getvalue().split("a line\n")
    assert before.endswith("\r")  # the bar is wiped first
    assert before.split("\r")[-2].strip() == ""
    assert "epoch:" in after  # and drawn again below
