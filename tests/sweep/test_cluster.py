"""Runs sweeps as a cluster's jobs: submitit's local and debug executors, and Slurm with stand-ins for its commands."""

import contextlib
import io
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from vit_tucker.cli.sweep import sweep_main
from vit_tucker.errors import ConfigError
from vit_tucker.run.main import train
from vit_tucker.sweep.cluster import ClusterExecutor, job_file
from vit_tucker.sweep.cluster_job import ClusterJob
from vit_tucker.sweep.plan import load_sweep
from vit_tucker.sweep.progress_table import Display
from vit_tucker.sweep.runner import Runner
from vit_tucker.sweep.schema import ExecutorConfig
from vit_tucker.sweep.status import read_statuses

pytestmark = pytest.mark.slow

pytest.importorskip("submitit")
FILE = """
base: digits/base.yaml
output_dir: out
start: null
executor: {time: 60, partition: gpu, account: lab, gpus: 1, cpus: 2, memory: 4, jobs: 3, slurm: {gres: 'gpu:a100:1'}}
set:
  plugins: [slow.py]
  model: {depth: 1, embed_dim: 32, num_heads: 4}
  train: {epochs: 6, warmup_epochs: 0, global_batch_size: 64, checkpoint_epochs: 1000, step_rule: slow}
  data: {num_samples: 128}
cells:
- {name: mha, attention: null}
- {name: gqa1, attention: {method: gqa, num_kv_heads: 1}, set: {train: {epochs: 1000}}}
"""
SLOW = """
import time
import vit_tucker
from vit_tucker.training.step import OrdinaryStep

@vit_tucker.register_step_rule("slow")
class Slow(OrdinaryStep):
    "Waits in each step, so that a signal finds the run at work; a waiting run takes nothing from the others."
    def step(self, closure, trainer):
        time.sleep(0.1)
        return super().step(closure, trainer)
"""
SBATCH = f"""#!{sys.executable} -SE
# Starts the tasks of an array in the background, each again after scontrol requeue; none where the cluster is full.
import os, re, subprocess, sys
fakes = os.environ["FAKES"]
if os.path.exists(fakes + "/refuses"):
    sys.exit("sbatch: error: invalid partition\\nsbatch: error: Batch job submission failed: Invalid partition name specified")
text = open(sys.argv[1]).read()
open(fakes + "/script", "w").write(text)
open(fakes + "/said-sbatch", "a").write("submitted\\n")
array = re.search(r"--array=.?0-(\\d+)", text)
tasks = range(int(array[1]) + 1) if array else [None]
for task in () if os.path.exists(fakes + "/full") else tasks:
    name = "77" if task is None else f"77_{{task}}"
    variables = {{**os.environ, "SLURM_JOB_ID": "77", "NAME": name}}
    if task is not None:
        variables |= {{"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": str(task)}}
    loop = 'while bash "$0"; again="$FAKES/requeue-$NAME"; [ -e "$again" ]; do rm "$again"; done; touch "$FAKES/over-$NAME"'
    errors = re.search(r"--error=(\\S+)", text)[1].strip("'").replace("%A_%a", name).replace("%j", name)
    quiet = dict(stdout=subprocess.DEVNULL, stderr=open(errors, "w"))
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
SCANCEL = """#!/usr/bin/env bash
echo "$@" >>"$FAKES/said-scancel"
[ -e "$FAKES/full" ] && echo "$1|CANCELLED by 0|" >>"$FAKES/states"
[ ! -e "$FAKES/pid-$1" ] || kill -TERM "$(cat "$FAKES/pid-$1")" 2>/dev/null
"""
SACCT = """#!/usr/bin/env bash
touch "$FAKES/said-sacct"
echo 'JobID|State|NodeList'
[ ! -e "$FAKES/states" ] || cat "$FAKES/states"
for script in "$FAKES"/over-* "$FAKES"/pid-*; do
  name=${script##*-}
  [ -e "$FAKES/over-$name" ] && state=FAILED || state=RUNNING
  echo "$name|$state|node-a"
done
"""


@pytest.fixture(autouse=True)
def fakes(tmp_path, monkeypatch):
    """Returns the folder of the stand-ins: empty files "full" and "refuses" set the cluster's state, "states" what sacct adds."""
    from submitit import SlurmJob

    SlurmJob.watcher.clear()
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
    Path("slow.py").write_text(SLOW)
    return folder


def sweep(*arguments):
    """Returns the exit status and the output of the command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = sweep_main(["--cfg", "s.yaml", *arguments])
    return status, out.getvalue()


def after(*steps):
    """Calls functions one after the other in a thread, each as soon as its file exists."""

    def wait():
        for file, act in steps:
            deadline = time.monotonic() + 90
            while not Path(file).exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def stop_this_sweep():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_preempted_run_is_queued_again_and_ends_as_if_undisturbed_and_the_rest_of_its_array_is_cancelled(fakes):
    acting = after(
        ("out/mha/seed0/summary.csv", lambda: os.kill(int((fakes / "pid-77_0").read_text()), signal.SIGUSR1)),
        ("out/gqa1/seed0/summary.csv", lambda: None),
        ("out/mha/seed0/results.json", stop_this_sweep),
    )
    status, text = sweep("--executor", "slurm", "--partition", "gpu-2")
    acting.join()
    assert status == 130, text
    assert "1 done, 1 interrupted" in text
    assert (fakes / "said-scontrol").read_text() == "requeue 77_0\n"
    script = (fakes / "script").read_text().replace("'", "")
    for option in ("partition=gpu-2", "account=lab", "time=60", "gpus-per-node=1", "cpus-per-task=2", "mem=4GB", "requeue",
                   "signal=USR1@300", "gres=gpu:a100:1", "array=0-1%2"):  # fmt: skip
        assert f"#SBATCH --{option}\n" in script
    assert "77_1" in (fakes / "said-scancel").read_text().split()
    assert Path("out/gqa1/seed0/checkpoints/last").exists()  # it saved
    before = Path("out/mha/seed0/summary.csv").read_bytes()
    assert sweep("--executor", "slurm", "--only", "mha")[0] == 0
    assert (fakes / "said-sbatch").read_text() == "submitted\n"  # nothing is submitted again
    assert train("out/mha/seed0.yaml", ["output_dir=undisturbed"]) == 0
    columns = [line.split(",") for line in before.decode().splitlines()]
    others = [line.split(",") for line in Path("undisturbed/summary.csv").read_text().splitlines()]
    measured = ("second", "time", "per_s", "memory")
    same = [i for i, name in enumerate(columns[0]) if not any(word in name for word in measured)]
    assert len(columns) == 7
    assert [[row[i] for i in same] for row in columns] == [[row[i] for i in same] for row in others]


def test_waiting_jobs_are_followed_by_the_next_sweep_and_cancelled_by_ctrl_c(fakes):
    (fakes / "full").touch()
    (fakes / "states").write_text("77_[0-1%2]|PENDING|\n")
    planned = load_sweep("s.yaml")
    Path("out").mkdir()
    for _ in range(2):  # the second finds the jobs that the first, which was killed, has left
        started = ClusterExecutor(planned.config.executor, planned.output_dir).start(planned.jobs)
        assert [run.status for run in started] == [None, None]
        assert [run.queued for run in started] == [True, True]
    assert (fakes / "said-sbatch").read_text() == "submitted\n"
    assert [job_file(job).read_text() for job in planned.jobs] == ["77_0", "77_1"]
    (fakes / "said-sacct").unlink()
    stopping = after((fakes / "said-sacct", stop_this_sweep))
    status, text = sweep("--executor", "slurm")
    stopping.join()
    assert status == 130, text
    assert "2 interrupted" in text
    assert sorted((fakes / "said-scancel").read_text().split()) == ["77_0", "77_1"]
    assert (fakes / "said-sbatch").read_text() == "submitted\n"


def test_jobs_that_die_are_named_with_what_is_known_and_the_sweep_ends(fakes):
    (fakes / "full").touch()
    (fakes / "states").write_text("77_0|CANCELLED by 1000|\n77_1|OUT_OF_MEMORY|node-a\n")
    status, text = sweep("--executor", "slurm")
    assert status == 1
    assert "mha, seed 0: failed: job 77_0, CANCELLED by 1000\n" in text  # by hand
    assert "gqa1, seed 0: failed: job 77_1, OUT_OF_MEMORY\n" in text
    assert text.endswith("2 failed\n")


def test_a_job_that_dies_before_its_run_shows_the_jobs_own_last_words(fakes):
    status, text = sweep("--executor", "slurm", "--only", "mha", "executor.setup=['echo no such module >&2; exit 1']")
    assert status == 1
    log = Path("out/.submitit/77_0_log.err").absolute()
    assert f"mha, seed 0: failed: job 77, FAILED: no such module; see {log}\n" in text


class Refusing:
    """An executor that starts one run and then nothing."""

    capacity, poll_seconds = 1, 0.0

    class Run:
        queued = False

        def __init__(self, job):
            self.job, self.looks = job, iter([None, None, 3])

        @property
        def status(self):
            return next(self.looks)

        def describe_ending(self):
            return "status 3"

    def start(self, jobs):
        if self.capacity > 1:
            raise ConfigError("executor: the jobs can't be submitted: too many")
        self.capacity = 2
        return [self.Run(job) for job in jobs]


def test_refused_submissions_end_a_sweep_only_if_nothing_runs(fakes):
    (fakes / "refuses").touch()
    status, text = sweep("--executor", "slurm")
    assert (status, text) == (2, "error: executor: the jobs can't be submitted: sbatch: error: Batch job submission failed: "
                                 "Invalid partition name specified\n")  # fmt: skip
    planned, out = load_sweep("s.yaml"), io.StringIO()
    statuses = read_statuses(planned.jobs, {})
    assert Runner(planned.jobs, statuses, Refusing(), Display(planned.jobs, statuses, out)).run() == 1
    assert "gqa1, seed 0: failed: executor: the jobs can't be submitted: too many\n" in out.getvalue()
    assert "mha, seed 0: failed: status 3\n" in out.getvalue()  # it was followed to its end


@pytest.mark.parametrize(
    ("cluster", "launch", "ending"),
    [("local", None, ""), ("debug", "--nothing", r"job DEBUG_\d+, DONE: .*--nothing; see out/mha/seed0\.log")],
)
def test_submitits_other_executors_run_a_job_here(cluster, launch, ending):
    planned = load_sweep("s.yaml", ["set.train.epochs=1"])
    jobs = planned.jobs[:1]
    Path("out").mkdir()
    statuses, out = read_statuses(jobs, {}), io.StringIO()
    executor = ClusterExecutor(ExecutorConfig(launch=launch), planned.output_dir, cluster, 0.1)
    status = Runner(jobs, statuses, executor, Display(jobs, statuses, out)).run()
    assert re.search(ending, out.getvalue())
    assert status == (0 if launch is None else 1), out.getvalue()
    if launch is None:
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
        (["slurm", "executor.patition=gpu"], "executor.patition: unknown key; did you mean 'partition'"),
        (["slurm", "executor.time=5"], "signal_seconds 300 leaves nothing of time 5"),
        (
            ["slurm", "--time", "1 hour"],
            "executor.time: a whole number of minutes, as 90, or 1440 for a day, not '1 hour'",
        ),
        (["slurm", "--gpus", "two"], "executor.gpus: Input should be a valid integer, not 'two'"),
        (["slurm", "--launch", "'--x"], "executor.launch: No closing quotation"),
        (["slurm", "executor.slurm.gpus_per_node=2"], "executor.slurm: gpus_per_node is set by executor.gpus"),
        (["local", "--gpus", "2"], "executor.gpus: only a cluster's jobs have it"),
        (["local", "executor.slurm.qos=high"], "executor.slurm.qos: only a cluster's jobs have it"),
    ],
)
def test_bad_sections_are_one_line(arguments, line):
    status, text = sweep("--dry-run", "--executor", *arguments)
    assert status == 2
    assert line in text
    assert text.count("\n") == 1


def test_without_slurm_or_submitit_one_line_says_what_to_do(fakes, monkeypatch):
    (fakes / "scancel").unlink()
    monkeypatch.setenv("PATH", f"{fakes}:/usr/bin:/bin")
    status, text = sweep("--executor", "slurm", "--dry-run")
    assert (status, text) == (2, "error: executor: slurm: there is no scancel here: start the sweep on a login node of the "
                              "cluster, or use --executor local\n")  # fmt: skip
    monkeypatch.setitem(sys.modules, "submitit", None)
    status, text = sweep("--executor", "slurm", "--dry-run")
    assert (status, text) == (
        2,
        "error: executor: slurm needs submitit: pip install 'vit_tucker[slurm]' (in a clone: ./run.sh setup slurm)\n",
    )
    assert not Path("out").exists()
    assert sweep("--executor", "local", "--dry-run")[0] == 0
