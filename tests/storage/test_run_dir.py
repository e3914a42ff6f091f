"""Log lines of a run end with it: what follows in the same process has the logger as it was."""

import io
import logging
import sys

import pytest

from vit_tucker.storage.run_dir import LOGGER, RunDir, log_lines


@pytest.mark.parametrize("fails", [False, True])
def test_lines_go_to_the_runs_own_streams(fails, tmp_path, monkeypatch, capsys):
    before = LOGGER.level, LOGGER.propagate, LOGGER.handlers[:]
    closed = io.StringIO()
    monkeypatch.setattr(sys, "stdout", closed)
    run_dir = RunDir(tmp_path / "a")
    try:
        with log_lines(True):
            run_dir.start("name: a\n", {}, None)
            log = next(handler for handler in LOGGER.handlers if isinstance(handler, logging.FileHandler))
            LOGGER.info("one")
            if fails:
                raise ValueError("as a run ends that fails")
    except ValueError:
        assert fails
    assert closed.getvalue() == "one\n"
    closed.close()
    assert (LOGGER.level, LOGGER.propagate, LOGGER.handlers) == before
    assert log.stream is None, "train.log is open still"
    LOGGER.info("two")
    logging.getLogger("vit_tucker.attention").error("three")
    assert "closed file" not in capsys.readouterr().err
    assert (run_dir.path / "train.log").read_text().splitlines()[0].endswith(" one")
    assert "three" not in (run_dir.path / "train.log").read_text()


def test_only_the_main_process_logs(capsys):
    for main, said in ((True, "one\n"), (False, "")):
        with log_lines(main):
            LOGGER.info("one")
        assert capsys.readouterr().out == said
