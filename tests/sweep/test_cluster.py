"""Sweeps as a cluster's jobs: submitit's debug executor, and Slurm with stand-ins for its commands."""

import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from vit_tucker.cli.sweep import sweep_main
from vit_tucker.run.main import train
from vit_tucker.sweep.cluster import ClusterExecutor, job_file
from vit_tucker.sweep.cluster_job import ClusterJob
from vit_tucker.sweep.plan import load_sweep
from vit_tucker.sweep.progress_table import Display
from vit_tucker.sweep.runner import Runner, read_statuses
from vit_tucker.sweep.schema import ExecutorConfig

pytest.importorskip("submitit")
FILE = """
base: digits/base.yaml
output_dir: out
start: null
executor: {time: 60, partition: gpu, account: lab, gpus: 1, cpus: 2, memory: 4, jobs: 3, slurm: {gres: 'gpu:a100:1'}}
set:
  model: {depth: 1, embed_dim: 32, num_heads: 4}
  train: {epochs: 6, warmup_epochs: 0, global_batch_size: 64, checkpoint_epochs: 1000}
  data: {num_samples: 128}
cells:
- {name: mha, attention: null}
- {name: gqa1, attention: {method: gqa, num_kv_heads: 1}}
"""
SBATCH = f"""#!{sys.executable} -SE
# Starts the tasks of an array in the background, each again after scontrol requeue.
import os, re, subprocess, sys
text = open(sys.argv[1]).read()
open(os.environ["FAKES"] + "/script", "w").write(text)
array = re.search(r"--array=.?0-(\\d+)", text)
tasks = range(int(array[1]) + 1) if array else [None]
for task in tasks:
    name = "77" if task is None else f"77_{{task}}"
    variables = {{**os.environ, "SLURM_JOB_ID": "77", "NAME": name}}
    if task is not None:
        variables |= {{"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": str(task)}}
    loop = 'while bash "$0"; again="$FAKES/requeue-$NAME"; [ -e "$again" ]; do rm "$again"; done; touch "$FAKES/over-$NAME"'
    quiet = dict(stdout=subprocess.DEVNULL, stderr=open(os.environ["FAKES"] + "/errors-" + name, "w"))
    subprocess.Popen(["bash", "-c", loop, sys.argv[1]], env=variables, start_new_session=True, **quiet)
print("Submitted batch job 77")
"""
SRUN = """#!/usr/bin/env bash
echo $$ >"$FAKES/pid-$NAME"
while [ "$1" != --unbuffered ]; do shift; done
shift
while [[ $1 == --* ]]; do shift 2; done
exec "$@"
"""
SCONTROL = '#!/usr/bin/env bash\necho "$@" >>"$FAKES/said-scontrol"\ntouch "$FAKES/requeue-$2"\n'
SCANCEL = '#!/usr/bin/env bash\necho "$@" >>"$FAKES/said-scancel"\nkill -TERM "$(cat "$FAKES/pid-$1")" 2>/dev/null\n'
SACCT = """#!/usr/bin/env bash
echo 'JobID|State|NodeList'
for pid in "$FAKES"/pid-*; do
  name=${pid##*pid-}
  [ -e "$FAKES/over-$name" ] && state=COMPLETED || state=RUNNING
  echo "$name|$state|node-a"
done
"""


@pytest.fixture(autouse=True)
def fakes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "fakes"
    folder.mkdir()
    for name, text in {
        "sbatch": SBATCH,
        "srun": SRUN,
        "scontrol": SCONTROL,
        "scancel": SCANCEL,
        "sacct": SACCT,
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("FAKES", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    Path("s.yaml").write_text(FILE)
    return folder


def sweep(*arguments):
    """Exit status and output."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = sweep_main(["--cfg", "s.yaml", *arguments])
    return status, out.getvalue()


def after_first_epoch(run, act):
    def wait():
        deadline = time.monotonic() + 60
        while not Path(run, "summary.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_preempted_run_is_queued_again_and_ends_as_if_undisturbed(fakes):
    command = ("--executor", "slurm", "--only", "mha", "set.train.epochs=12")
    warn = after_first_epoch("out/mha/seed0", lambda: os.kill(int((fakes / "pid-77").read_text()), signal.SIGUSR1))
    status, text = sweep(*command)
    warn.join()
    assert status == 0, text + (fakes / "errors-77").read_text()
    assert (fakes / "said-scontrol").read_text() == "requeue 77\n"
    script = (fakes / "script").read_text()
    for option in ("partition=gpu", "account=lab", "time=60", "gpus-per-node=1", "cpus-per-task=2", "mem=4GB", "requeue",
                   "signal=USR1@300", "gres=gpu:a100:1"):  # fmt: skip
        assert f"#SBATCH --{option}\n" in script.replace("'", "")
    before = Path("out/mha/seed0/summary.csv").read_bytes()
    assert sweep(*command)[0] == 0  # nothing is submitted again
    assert train("out/mha/seed0.yaml", ["output_dir=undisturbed"]) == 0
    columns = [line.split(",") for line in before.decode().splitlines()]
    others = [line.split(",") for line in Path("undisturbed/summary.csv").read_text().splitlines()]
    same = [
        i
        for i, name in enumerate(columns[0])
        if not any(word in name for word in ("second", "time", "per_s", "memory"))
    ]
    assert len(columns) == 13
    assert [[row[i] for i in same] for row in columns] == [[row[i] for i in same] for row in others]


def test_an_interrupted_sweep_cancels_its_array(fakes):
    stop = after_first_epoch("out/gqa1/seed0", lambda: os.kill(os.getpid(), signal.SIGTERM))
    status, text = sweep("--executor", "slurm", "set.train.epochs=1000")
    stop.join()
    assert status == 130, text
    assert "2 interrupted" in text
    assert sorted((fakes / "said-scancel").read_text().split()) == ["77_0", "77_1"]
    assert "--array=0-1%2" in (fakes / "script").read_text().replace("'", "")
    assert Path("out/gqa1/seed0/checkpoints/last").exists()  # it saved
    assert not (fakes / "said-scontrol").exists()
    assert job_file(load_sweep("s.yaml").jobs[0]).read_text() == "77_0"


def test_submitits_debug_executor_runs_a_job_here():
    planned = load_sweep("s.yaml", ["set.train.epochs=1"])
    jobs = planned.jobs[:1]
    Path("out").mkdir()
    statuses, out = read_statuses(jobs, {}), io.StringIO()
    executor = ClusterExecutor(ExecutorConfig(), planned.output_dir, "debug", 0.1)
    assert Runner(jobs, statuses, executor, Display(jobs, statuses, out)).run() == 0, out.getvalue()
    assert json.loads(Path("out/mha/seed0/results.json").read_text())["epochs"] == 1


def test_a_run_without_progress_is_not_queued_again(tmp_path):
    payload = ClusterJob((), str(tmp_path), str(tmp_path / "log"), None, limit_seconds=-1e12)
    assert payload.checkpoint() is None
    assert "no checkpoint was written before the time limit" in (tmp_path / "log").read_text()
    again = ClusterJob(("--cfg", "x"), str(tmp_path), str(tmp_path / "log"), None, limit_seconds=1e12)
    assert again.checkpoint().function == again  # pre-empted early: it starts again


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["executor.patition=gpu"], "did you mean 'partition'"),
        (["executor.time=5"], "signal_seconds 300 leaves nothing of time 5"),
    ],
)
def test_bad_sections_are_one_line(arguments, line):
    status, text = sweep("--executor", "slurm", "--dry-run", *arguments)
    assert status == 2
    assert line in text
    assert text.count("\n") == 1


def test_without_slurm_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    status, text = sweep("--executor", "slurm", "--dry-run")
    assert (status, text) == (2, "error: executor: slurm: there is no sbatch here: start the sweep on a login node of the "
                              "cluster, or use --executor local\n")  # fmt: skip
    assert not Path("out").exists()
