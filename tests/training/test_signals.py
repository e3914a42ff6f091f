"""SIGINT, SIGTERM and SIGUSR1: the state is saved, status 130, the same command or the one that is printed goes on."""

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.training.processes import finish, saved_steps, start, start_all
from tests.training.test_kills import RECIPE, mortal, outcome
from vit_tucker.run.main import resume_command
from vit_tucker.sweep.cluster_job import children
from vit_tucker.training.coordination import Coordinator, VoteResult
from vit_tucker.training.interrupt import Signals, catch_signals

pytestmark = pytest.mark.slow

COMMAND = [
    "--cfg",
    "digits/tucker_r16",
    *RECIPE,
    "train.checkpoint_steps=null",
    "train.epochs=4",
    "train.eval_batch_size=90",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert finish([start([*COMMAND, f"output_dir={folder}"], folder.with_suffix(".log"))]) == [0]
    return folder


def wait_for(text: str, log: Path, process) -> None:
    while text not in (log.read_text() if log.is_file() else ""):
        assert process.is_alive(), log.read_text()
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda s: s.name)
def test_a_signal_saves_and_leaves_and_the_same_command_goes_on(whole, tmp_path, number):
    """Ctrl-C goes to the loader's workers too."""
    folder, log = tmp_path / "run", tmp_path / "log"
    process = start([*COMMAND, f"output_dir={folder}"], log)
    wait_for("epoch 1/4", log, process)
    time.sleep(0.05)
    workers = children(process.pid) if number == signal.SIGINT else []
    assert len(workers) == (number == signal.SIGINT)
    for each in (*workers, process.pid):
        os.kill(each, number)
    assert finish([process]) == [130]
    step = saved_steps(folder)
    assert 11 < step < 44
    assert "Traceback" not in log.read_text()
    last = log.read_text().splitlines()[-1]
    assert last.startswith(f"stopped by {number.name} after step {step} (epoch {step // 11 + 1}), state saved; ")
    assert last.endswith(f"the same command continues, or: {sys.executable} experiments/train_vit.py --cfg {folder}")
    assert not (folder / "results.json").exists()
    if number != signal.SIGTERM:  # what has been saved is the same after any of them
        return
    assert finish([start(shlex.split(last.partition(".py ")[2]), log)]) == [0]
    assert f"continuing {folder} from step {step}" in log.read_text()
    assert outcome(folder) == outcome(whole)


def test_a_signal_during_an_evaluation_stops_it_before_its_end(whole, tmp_path):
    """The epoch's steps are saved, its evaluation is done by the next run."""
    folder, log = tmp_path / "run", tmp_path / "log"
    command = [*COMMAND, *mortal(tmp_path), f"output_dir={folder}"]
    assert finish([start(command, log, SIGNAL="15", EPOCH="0", MODEL="model")]) == [130], log.read_text()
    progress = json.loads((folder / "checkpoints/last/state.json").read_text())["progress"]
    assert (progress["epoch"], progress["step"], progress["rows"]) == (0, 11, [])
    assert finish([start(command, log)]) == [0], log.read_text()
    assert outcome(folder) == outcome(whole)


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    """And one process goes on where two have stopped, which is said."""
    folder, log = tmp_path / "run", tmp_path / "log"
    command = [*COMMAND, "train.cpu=true", f"output_dir={folder}"]
    both = start_all(2, command, log)
    wait_for("epoch 1/4", log, both[0])
    os.kill(both[1].pid, signal.SIGUSR1)
    assert finish(both) == [130, 130], log.read_text()
    assert log.read_text().count("stopped by SIGUSR1 after step") == 1
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 experiments/train_vit.py --cfg"
    assert f"or: {sys.executable} {launcher} {folder}" in log.read_text()
    assert finish([start(command, log)]) == [0], log.read_text()
    assert "on 1 process(es), before on 2: the same images and batches" in log.read_text()


def test_no_command_for_one_machine_continues_a_run_on_several(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert resume_command("runs/a") is None
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(sys, "argv", ["experiments/train_vit.py"])
    assert resume_command("a run").endswith("--num_processes 8 experiments/train_vit.py --cfg 'a run'")


def test_signals_are_noted_and_the_second_ctrl_c_interrupts_at_once(monkeypatch):
    signals = Signals()
    with catch_signals(signals):
        assert signals.number == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    signals = Signals()
    for moment in (10.0, 11.0):  # a launcher passes the same Ctrl-C on
        now[0] = moment
        signals.catch(signal.SIGINT, None)
    now[0] = 13.0
    with pytest.raises(KeyboardInterrupt):
        signals.catch(signal.SIGINT, None)


def test_a_single_process_gets_its_own_vote_at_once():
    assert Coordinator().vote(15, diverged=True) == VoteResult(15, True, False)
    assert Coordinator().vote() == VoteResult()
    assert Coordinator().union(["b", "a", "b"]) == ["a", "b"]
    with pytest.raises(ZeroDivisionError):
        Coordinator().together(lambda: 1 / 0)
    assert Coordinator().main_first(lambda: 3) == Coordinator().on_main(lambda: 3) == 3
