"""One writer per run folder: refused while another process trains there, free at once when it is killed."""

import errno
import fcntl
import json
import multiprocessing
import os
import re
import socket
import time
from pathlib import Path

import pytest

from tests.training.processes import finish, start_all
from vit_tucker.cli import main, train_main
from vit_tucker.errors import ConfigError
from vit_tucker.training.lock import RunLock

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_tmp")]
FORK = multiprocessing.get_context("fork")
RUN = ["--cfg", "digits/dense", "model.depth=1", "train.cpu=true", "output_dir=a"]


def hold(folder: Path, ready) -> None:
    """Hold a folder until killed, with a child, as a run has loader workers, that outlives it."""
    RunLock(folder).take()
    if (child := os.fork()) == 0:
        time.sleep(60)
        os._exit(0)
    ready.send(child)
    time.sleep(60)


@pytest.fixture
def holder():
    """A process that holds the folder a, and its child."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=hold, args=(Path("a"), there))
    process.start()
    child = here.recv()
    yield process, child
    process.kill()
    os.kill(child, 9)


def contents() -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in Path("a").rglob("*")}


def test_a_second_run_is_refused_by_name_until_the_first_is_killed(holder):
    process, child = holder
    before = contents()
    named = (
        rf"a is being written by process {process.pid} on {re.escape(socket.gethostname())}, started 20\S+ \S+; wait"
    )
    for refused in (RunLock(Path("a")).take, RunLock(Path("a")).refuse_held):
        with pytest.raises(ConfigError, match=named):
            refused()
    assert contents() == before
    process.kill()
    process.join()
    os.kill(child, 0)  # what it started lives on, and holds nothing
    RunLock(Path("a")).refuse_held()
    lock = RunLock(Path("a"))
    lock.take()
    assert lock.held
    assert json.loads(lock.file.read_text())["pid"] == os.getpid()
    lock.release()
    assert contents() == {}


@pytest.mark.parametrize("option", [[], ["--dry-run"]], ids=["train", "dry run"])
def test_the_command_refuses_in_one_line_and_changes_nothing(holder, capfd, option):
    before = contents()
    assert train_main([*RUN, *option]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"error: output_dir: a is being written by process {holder[0].pid} on ")
    assert len(said.splitlines()) == 1
    assert contents() == before


def test_all_processes_of_a_run_are_refused_at_once(holder, tmp_path):
    before = time.monotonic()
    assert finish(start_all(2, [*RUN[:-1], f"output_dir={tmp_path}/a"], tmp_path / "log")) == [2, 2]
    assert (tmp_path / "log").read_text().count("error: ") == 1
    assert time.monotonic() - before < 60


def test_a_conversion_does_not_write_into_a_run(holder, capfd):
    assert main(["convert", "vit_tiny_patch16_224", "--method", "gqa num_kv_heads=1", "--out", "a"]) == 2
    assert capfd.readouterr().err.startswith(f"error: --out: a is being written by process {holder[0].pid} on ")


def test_one_process_can_not_hold_a_folder_twice():
    first, second = RunLock(Path("a")), RunLock(Path("a").absolute())
    first.take()
    first.take()  # its own
    for refused in (second.take, second.refuse_held):
        with pytest.raises(ConfigError, match=f"by process {os.getpid()} on "):
            refused()
    first.release()
    second.take()
    second.release()


def test_a_foreign_lock_and_a_file_system_without_locks_are_noted(monkeypatch):
    Path("a").mkdir()
    Path("a/run.lock").write_text(json.dumps({"host": "elsewhere", "pid": 7, "started": "2026-01-01"}))
    lock = RunLock(Path("a"))
    lock.take()
    assert lock.note == (
        "a: process 7 on elsewhere, started 2026-01-01 left its lock behind, and has ended as far as the file system shows"
    )
    lock.release()

    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    for junk in ("", "[]", "no JSON", '{"host": 1}'):
        Path("a/run.lock").write_text(junk)
        lock = RunLock(Path("a"))
        lock.take()
        assert lock.note == "a: its file system can't lock (No locks available): start no second run here"
        lock.release()


def test_a_folder_that_can_not_be_written_to_is_refused():
    Path("a").write_text("")
    with pytest.raises(ConfigError, match=r"^output_dir: a/run.lock can't be written to: File exists$"):
        RunLock(Path("a")).take()
