"""How OpenMP's threads wait: by what others compute, and never against the user."""

import os
import subprocess
import sys

import pytest

from vit_tucker.run.openmp import (
    NO_SPIN,
    SHORT_SPIN,
    USERS_OWN,
    available_cores,
    busy_cores,
    choose_waiting,
    describe_waiting,
    waiting,
)


@pytest.mark.parametrize(
    ("environment", "cores", "busy", "expected"),
    [
        ({}, 2, 0.0, SHORT_SPIN),
        ({}, 2, 0.4, SHORT_SPIN),
        ({}, 2, 1.0, NO_SPIN),
        ({}, 64, 3.0, NO_SPIN),  # 64 threads and 61 free cores
        ({"OMP_NUM_THREADS": "8"}, 64, 3.0, SHORT_SPIN),
        ({"OMP_NUM_THREADS": "8"}, 64, 60.0, NO_SPIN),
        ({"OMP_NUM_THREADS": "4,2"}, 8, 4.0, SHORT_SPIN),
        ({"OMP_NUM_THREADS": "nonsense"}, 2, 2.0, NO_SPIN),
        ({"OMP_NUM_THREADS": "1"}, 2, 2.0, {}),
        ({}, 1, 1.0, {}),
    ],
)
def test_threads_sleep_at_once_where_others_need_the_cores(environment, cores, busy, expected):
    assert waiting(environment, cores, lambda: busy) == expected


def test_what_others_compute_is_not_measured_for_one_thread():
    waiting({"OMP_NUM_THREADS": "1"}, 2, lambda: pytest.fail("measured"))


@pytest.mark.slow
def test_a_busy_process_is_seen():
    spinning = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        spinning.stdout.readline()
        assert 0.3 < busy_cores(0.2) <= available_cores()
    finally:
        spinning.kill()
        spinning.communicate()


CODE = """
import os, sys
from vit_tucker.cli.main import main
main(["train", "--cfg", "digits/dense", "train.epochz=1"])
print(*(f"{name}={os.environ[name]}" for name in sys.argv[1:] if name in os.environ))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT=6000", "OMP_WAIT_POLICY=PASSIVE"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY=ACTIVE"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT=7"}),
        ({"OMP_NUM_THREADS": "1"}, {""}),
    ],
)
def test_commands_choose_unless_the_user_has(own, expected):
    environment = {name: value for name, value in os.environ.items() if name not in (*USERS_OWN, "OMP_NUM_THREADS")}
    if available_cores() == 1:
        expected = expected - {"GOMP_SPINCOUNT=6000", "OMP_WAIT_POLICY=PASSIVE"} or {""}
    arguments = [sys.executable, "-c", CODE, *USERS_OWN]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment | own)
    assert done.stdout.strip() in expected, done.stderr


def test_nothing_is_set_where_torch_has_read_the_environment(monkeypatch):
    import torch  # noqa: F401

    for name in USERS_OWN:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    choose_waiting()
    assert dict(os.environ) == before


def test_logs_say_how_threads_wait():
    assert describe_waiting({"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}) == "OMP_WAIT_POLICY=PASSIVE"
    assert describe_waiting({"OMP_NUM_THREADS": "2"}) == "OpenMP's own waiting"
