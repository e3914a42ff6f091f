"""Several processes by `python -m vit_tucker.cli.launch`: one line and the right status, before and after they start."""

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from vit_tucker.cli.launch import main, status_of
from vit_tucker.data.sampler import refuse_uneven
from vit_tucker.errors import ConfigError
from vit_tucker.run.accelerator import refuse_missing_gpus

ROOT = Path(__file__).parents[2]
LAUNCH = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.mark.parametrize(
    ("processes", "arguments", "message"),
    [
        (3, ["--cfg", "digits/dense"], "error: train.global_batch_size=32 can't be split evenly over 3 processes x 1 "),
        (2, ["--cfg", "digits/dense", "train.epoch=1"], "error: command line: train.epoch: unknown key; did you mean"),
        (2, ["--cfg", "digits/dens"], "error: digits/dens: no such config"),
        (2, [], "error: train needs one of MODEL and --cfg"),
        (4, ["vit_tiny_patch16_224", "data.dataset=digits", "train.grad_accum_steps=16"], "over 4 processes x 16"),
    ],
)
def test_what_can_be_known_is_refused_before_the_processes_start(in_tmp, capfd, processes, arguments, message):
    script = str(ROOT / "experiments" / "train_vit.py")
    assert main([*LAUNCH, "--num_processes", str(processes), script, *arguments]) == 2
    out, error = capfd.readouterr()
    assert message in error
    assert error.count("\n") == 1
    assert not out
    assert not list(in_tmp.iterdir())


def test_uneven_batches_name_what_goes():
    start = "^train.global_batch_size=32 can't be split evenly over 3 processes x 1 accumulation steps: "
    with pytest.raises(
        ConfigError, match=f"{start}choose train.global_batch_size=30 or train.global_batch_size=33, or 2 or 4"
    ):
        refuse_uneven(32, 3, 1)
    with pytest.raises(ConfigError, match=r"choose train.global_batch_size=7, or 3 processes$"):
        refuse_uneven(3, 7, 1)
    with pytest.raises(
        ConfigError, match=r"2 processes x 3 accumulation steps: choose train.global_batch_size=30 or .*=36$"
    ):
        refuse_uneven(32, 2, 3)
    for sizes in ((32, 2, 1), (32, 4, 8), (30, 3, 2), (7, 7, 1)):
        refuse_uneven(*sizes)


def test_fewer_gpus_than_processes():
    with pytest.raises(ConfigError, match=r"^3 processes on a machine with 2 GPUs: start at most 2 \(NUM_PROCESSES=2"):
        refuse_missing_gpus(3, 2)
    for processes, gpus in ((2, 2), (1, 8), (3, 0)):  # without GPUs they talk over gloo
        refuse_missing_gpus(processes, gpus)


def test_the_status_is_that_of_what_went_wrong(capsys):
    assert status_of({0: 2, 1: -15}) == 2  # the others are ended by the launcher
    assert status_of({1: 1, 0: 2}) == 2
    assert status_of({0: 130, 1: -15}) == 130
    assert status_of({0: 1, 1: -15}) == 1
    assert not capsys.readouterr().err
    assert status_of({1: -signal.SIGKILL}) == 1
    assert capsys.readouterr().err == "error: process 1 was killed by SIGKILL\n"


@pytest.fixture
def kept_handlers(monkeypatch):
    """torch's launcher sets handlers of signals in this process, and we a variable for its logs."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    monkeypatch.setenv("LOGLEVEL", "CRITICAL")
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


SCRIPT = """
import os, signal, sys, time
if os.environ["RANK"] == "0":
    time.sleep(0.2)
    print("error: why", file=sys.stderr)
    {ending}
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "status", "said"),
    [
        ("sys.exit(2)", 2, "error: why\n"),
        ("sys.exit(1)", 1, "error: why\n"),
        ("sys.exit(130)", 130, "error: why\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, "error: why\nerror: process 0 was killed by SIGKILL\n"),
    ],
)
def test_the_line_and_status_of_a_process_are_the_launchers(tmp_path, capfd, kept_handlers, ending, status, said):
    """The others, which wait for it, are ended; torch's own words stay away."""
    (tmp_path / "script.py").write_text(SCRIPT.format(ending=ending))
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    launch = [*LAUNCH, "--num_processes", "2", "--main_process_port", port]
    assert main([*launch, str(tmp_path / "script.py")]) == status
    assert capfd.readouterr().err == said


@pytest.mark.skipif(not shutil.which("bash"), reason="run.sh needs bash")
@pytest.mark.parametrize("number", ["three", "0", "-1", "1.5"])
def test_run_sh_refuses_what_is_no_number_of_processes(tmp_path, number):
    shutil.copy(ROOT / "run.sh", tmp_path)  # nothing is set up before
    environment = {**os.environ, "NUM_PROCESSES": number}
    done = subprocess.run(["bash", "run.sh", "train"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"error: NUM_PROCESSES={number}: a number of processes, 1 or more\n")
