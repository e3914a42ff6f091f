"""Workers whose launcher was killed by SIGKILL save their state and leave; a run whose shell has ended trains on."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from tests.training.processes import finish, fork, saved_steps, start_all, train, worker_environments
from tests.training.rules import plugin
from tests.training.test_kills import RECIPE, outcome
from vit_tucker.training.launcher import launcher_process, leaving_with_launcher

SLOW = plugin('time.sleep(0.3 if "TORCHELASTIC_RUN_ID" in os.environ else 0)')


def launch(arguments: list[str], output: str, pids: str) -> None:
    """As torchrun does: two workers, children of this process, which waits for them."""
    context = multiprocessing.get_context("fork")
    environments = worker_environments(2, TORCHELASTIC_RUN_ID="none")
    workers = [context.Process(target=train, args=(arguments, output, environment)) for environment in environments]
    for worker in workers:
        worker.start()
    Path(pids).write_text(" ".join(str(worker.pid) for worker in workers))
    for worker in workers:
        worker.join()


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="asks /proc for processes that are nobody's children")
def test_workers_of_a_killed_launcher_stop_and_the_run_goes_on_to_the_same_end(tmp_path):
    folder, whole, log = tmp_path / "run", tmp_path / "whole", tmp_path / "log"
    (tmp_path / "slow.py").write_text(SLOW)
    command = ["--cfg", "digits/tucker_r16", *RECIPE, "train.epochs=1", "train.warmup_epochs=0", "train.cpu=true"]
    command += [f"plugins=[{tmp_path}/slow.py]", "train.step_rule=faulty", "data.num_workers=0"]
    launcher = fork.Process(target=launch, args=([*command, f"output_dir={folder}"], str(log), str(tmp_path / "pids")))
    launcher.start()
    undisturbed = start_all(2, [*command, f"output_dir={whole}"], tmp_path / "whole.log")
    while saved_steps(folder) < 2:
        assert launcher.is_alive(), log.read_text()
        time.sleep(0.005)
    launcher.kill()
    killed, workers = time.monotonic(), [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    while any(map(lives, workers)):
        assert time.monotonic() - killed < 10
        time.sleep(0.01)
    said, step = log.read_text(), saved_steps(folder)
    assert f"the launcher (process {launcher.pid}) is gone: stopping" in said
    assert f"stopped by SIGTERM after step {step} " in said
    assert 2 <= step < 11
    assert finish(undisturbed) == [0, 0]
    assert finish(start_all(2, [*command, f"output_dir={folder}"], log)) == [0, 0], log.read_text()
    assert f"continuing {folder} from step {step}" in log.read_text()
    assert outcome(folder) == outcome(whole)


def orphaned(launched: bool, ignores: bool) -> str:
    """What a process says whose parent ends after 0.1 s: 'started', and after half a second 'trained on'."""
    reading, writing = os.pipe()
    if (parent := os.fork()) == 0:
        if os.fork() == 0:
            os.close(reading)
            signal.signal(signal.SIGTERM, signal.SIG_IGN if ignores else signal.SIG_DFL)
            with leaving_with_launcher(os.getppid() if launched else launcher_process({}), 0.02, 0.1):
                os.write(writing, b"started")
                time.sleep(0.5)
                os.write(writing, b", trained on")
            os._exit(0)
        time.sleep(0.1)
        os._exit(0)
    os.waitpid(parent, 0)
    os.close(writing)
    with os.fdopen(reading) as said:
        return said.read()


def test_workers_end_with_a_launcher_and_with_no_other_parent():
    assert orphaned(launched=True, ignores=False) == "started"
    assert orphaned(launched=True, ignores=True) == "started"  # waiting for a peer that is gone
    assert orphaned(launched=False, ignores=False) == "started, trained on"


def test_a_launcher_is_known_by_its_environment_and_not_by_a_shells():
    assert launcher_process({"TORCHELASTIC_RUN_ID": "none"}) == os.getppid()
    assert launcher_process({"ACCELERATE_MIXED_PRECISION": "bf16", "LOCAL_RANK": "0"}) is None  # this is no accelerate
    assert launcher_process({}) is None
