"""The Slurm script, with stand-ins for srun, scontrol and the launcher: what it starts, whom it signals, when it queues again."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from tests.training.test_distributed import ROOT

pytestmark = pytest.mark.slow

SRUN = """#!/usr/bin/env bash
# Starts the command once per node, as srun does with one task per node, and hands USR1 on to the tasks.
while [ "$1" != bash ]; do case $1 in --nodes) nodes=$2 ;; esac; shift; done
tasks=()
for ((node = 0; node < nodes; node++)); do SLURM_NODEID=$node "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
status=0
for task in "${tasks[@]}"; do
  wait "$task" || worst=$?
  while kill -0 "$task" 2>/dev/null; do worst=0; wait "$task" || worst=$?; done
  [ "${worst:-0}" -eq 0 ] || status=$worst
done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
  show) printf '%s\\n' "${MAIN:-node-a}" node-b ;;
  requeue) echo "$2" >>"$FAKES/requeued" ;;
esac
"""
ACCELERATE = """#!/usr/bin/env bash
# A launcher with one training process: dies of USR1 unless it ignores it, and ends with 1 if its process fails.
printf '%s\\n' "$@" >"$FAKES/launch-$SLURM_NODEID"
"$FAKES/training" || exit 1
"""
TRAINING = f"""#!{sys.executable} -SE
import os, pathlib, signal, sys, time
run, fakes, node, mode = (os.environ[key] for key in ("RUN", "FAKES", "SLURM_NODEID", "MODE"))
def save(step):
    if node == "0":
        (folder := pathlib.Path(run, "checkpoints")).mkdir(exist_ok=True)
        (folder / "last").unlink(missing_ok=True)
        (folder / "last").symlink_to(f"step-{{step}}")
def leave(*_):
    if mode != "stuck":
        save(7)
    pathlib.Path(fakes, f"left-{{node}}").touch()
    sys.exit(130)
if mode == "done":
    pathlib.Path(run, "results.json").touch()
    sys.exit(0)
save(3)
if mode == "fail":
    sys.exit(1)
signal.signal(signal.SIGUSR1, leave)
pathlib.Path(fakes, f"ready-{{node}}").touch()
time.sleep(20)
"""


@pytest.fixture
def slurm(tmp_path):
    """-> start(mode) of the batch script on two nodes, in a folder of its own."""
    fakes, run = tmp_path / "fakes", tmp_path / "my run"
    fakes.mkdir()
    run.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("accelerate", ACCELERATE), ("training", TRAINING)):
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o755)
    variables = {"FAKES": fakes, "RUN": run, "ACCELERATE": fakes / "accelerate", "SLURM_SUBMIT_DIR": ROOT}
    variables |= {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": 2, "SLURM_JOB_ID": 41234}
    variables |= {"SLURM_GPUS_ON_NODE": 8, "PATH": f"{fakes}:{os.environ['PATH']}"}

    jobs: list[subprocess.Popen] = []

    def begin(mode: str, *arguments: str, **changes: object) -> subprocess.Popen:
        given = arguments or ("--cfg", "imagenet/dense", f"output_dir={run}", "train.lr=1e-3")
        command = [shutil.which("bash"), str(ROOT / "experiments" / "slurm" / "train.sbatch"), *given]
        environment = {**os.environ, **{k: str(v) for k, v in {**variables, **changes}.items()}, "MODE": mode}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        jobs.append(subprocess.Popen(command, env=environment, start_new_session=True, cwd=tmp_path, **pipes))
        return jobs[-1]

    yield begin, fakes, run
    for job in jobs:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


def test_slurm_launches_one_training_on_all_nodes(slurm):
    begin, fakes, run = slurm
    out, error = (job := begin("done")).communicate(timeout=30)
    assert (job.returncode, error) == (0, "")
    assert f"finished: {run}" in out
    assert not (fakes / "requeued").exists()
    for node in (0, 1):
        words = (fakes / f"launch-{node}").read_text().splitlines()
        args = launch_command_parser().parse_args(words[1:])  # accelerate's own parser understands them
        assert words[0] == "launch"
        assert (args.num_machines, args.num_processes, args.machine_rank) == (2, 16, node)
        assert (args.main_process_ip, args.main_process_port) == ("node-a", 21234)
        assert (ROOT / args.config_file).is_file()
        assert args.training_script == "experiments/train_vit.py"
        assert args.training_script_args == ["--cfg", "imagenet/dense", f"output_dir={run}", "train.lr=1e-3"]


def interrupt(job: subprocess.Popen, fakes: Path) -> tuple[str, str]:
    """What Slurm does before the time limit: USR1 to the batch script alone."""
    deadline = time.monotonic() + 20
    while not all((fakes / f"ready-{node}").exists() for node in (0, 1)):
        assert time.monotonic() < deadline
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    return job.communicate(timeout=30)


def test_slurm_queues_an_interrupted_run_again(slurm):
    begin, fakes, _ = slurm
    out, error = interrupt(job := begin("run"), fakes)
    assert (job.returncode, error) == (0, "")
    assert "interrupted after step-7; queued again" in out
    assert (fakes / "requeued").read_text() == "41234\n"
    assert (fakes / "left-0").exists()
    assert (fakes / "left-1").exists()  # the training processes got the signal on both nodes, and their launchers lived


def test_slurm_does_not_queue_again_what_makes_no_progress(slurm):
    begin, fakes, run = slurm
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last").symlink_to("step-3")  # where the job starts, and where it still is at its end
    _, error = interrupt(job := begin("stuck"), fakes)
    assert job.returncode == 1
    assert "no checkpoint was written before the time limit" in error
    assert (fakes / "left-0").exists()  # it was asked to leave
    assert not (fakes / "requeued").exists()


def test_slurm_does_not_queue_a_failed_run_again(slurm):
    begin, fakes, _ = slurm
    _, error = (job := begin("fail")).communicate(timeout=30)
    assert job.returncode == 1
    assert "the training ended with status 1; not queued again" in error
    assert not (fakes / "requeued").exists()


def test_slurm_needs_a_run_folder(slurm):
    begin, fakes, _ = slurm
    _, error = (job := begin("done", "--cfg", "imagenet/dense")).communicate(timeout=30)
    assert job.returncode == 2
    assert error == "error: output_dir= is missing: name the run folder, on a file system that all nodes see\n"
    assert not (fakes / "launch-0").exists()


def test_slurm_reaches_training_processes_behind_a_real_launcher(slurm, tmp_path):
    """accelerate's launcher on one node with two processes: both get the signal, it does not die of it."""
    begin, fakes, run = slurm
    project = tmp_path / "project" / "experiments"
    shutil.copytree(ROOT / "experiments" / "accelerate", project / "accelerate")
    (project / "train_vit.py").write_text(TRAINING.replace('"SLURM_NODEID"', '"RANK"'))
    (fakes / "launcher").write_text(
        f"#!{sys.executable}\nfrom accelerate.commands.accelerate_cli import main\nmain()\n"
    )
    (fakes / "launcher").chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    changes = {"ACCELERATE": fakes / "launcher", "SLURM_SUBMIT_DIR": tmp_path / "project", "SLURM_JOB_NUM_NODES": 1}
    changes |= {"SLURM_GPUS_ON_NODE": 2, "MAIN": "127.0.0.1", "MASTER_PORT": port}
    out, error = interrupt(job := begin("run", f"output_dir={run}", **changes), fakes)
    assert job.returncode == 0, error
    assert "interrupted after step-7; queued again" in out
    assert (fakes / "left-0").exists()
    assert (fakes / "left-1").exists()
    assert "exitcode  : 130" in error  # what the launcher says of its processes; it was alive to say it
