"""Launchers: the shipped Accelerate configs, the Slurm script, and two launchers that make one training over the loopback."""

import csv
import json
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
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from tests.conftest import process_environment
from tests.training.test_distributed import RECIPE, ROOT, data_root  # noqa: F401  # a fixture
from vit_tucker.cli import train_main

CONFIGS = ROOT / "experiments" / "accelerate"
PROCESSES = {"cpu": 1, "cpu2": 2, "gpu1": 1, "gpu8": 8, "nodes2x8": 16, "fsdp2": 8}
SCRIPT = str(ROOT / "experiments" / "train_vit.py")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def free_ports() -> tuple[str, str]:
    """Two different free ports: both are bound before either is given back."""
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("", 0))
        return str(one.getsockname()[1]), str(other.getsockname()[1])


# ---- the shipped configs


def launch_arguments(file: Path):
    """What `accelerate launch --config_file FILE script.py` makes of a file; unknown keys of a section are refused."""
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(file), "script.py"])
    unknown = set(yaml.safe_load(file.read_text()).get("fsdp_config", {})) - set(vars(args))
    assert not unknown, f"accelerate launch has no such options: {sorted(unknown)}"
    return _validate_launch_command(args)[0]


def known_by_this_accelerate(name: str) -> bool:
    return name != "fsdp2" or "fsdp_version" in vars(launch_command_parser().parse_args(["script.py"]))


def test_every_shipped_config_is_tested():
    assert {file.stem for file in CONFIGS.glob("*")} == set(PROCESSES)


@pytest.mark.parametrize("name", PROCESSES)
def test_config_is_what_accelerate_launch_takes(name):
    if not known_by_this_accelerate(name):
        pytest.skip("this accelerate has no FSDP version 2")
    file = CONFIGS / f"{name}.yaml"
    assert isinstance(load_config_from_file(str(file)), ClusterConfig)
    args = launch_arguments(file)
    assert args.num_processes == PROCESSES[name]
    assert args.num_machines == (2 if name == "nodes2x8" else 1)
    assert args.multi_gpu == (name in ("cpu2", "gpu8", "nodes2x8"))
    assert args.use_fsdp == (name == "fsdp2")
    if args.use_fsdp:
        assert (args.fsdp_version, args.fsdp_state_dict_type) == (2, "FULL_STATE_DICT")


@pytest.mark.parametrize("name", PROCESSES)
def test_config_says_how_it_is_used(name):
    header = (CONFIGS / f"{name}.yaml").read_text().partition("compute_environment")[0]
    assert f"--config_file experiments/accelerate/{name}.yaml" in header
    assert "experiments/train_vit.py --cfg" in header
    assert "# Change" in header


def test_a_typo_in_a_config_is_seen(tmp_path):
    file = tmp_path / "typo.yaml"
    file.write_text((CONFIGS / "gpu8.yaml").read_text().replace("num_processes", "num_proceses"))
    with pytest.raises(ValueError, match="num_proceses"):
        load_config_from_file(str(file))
    file.write_text((CONFIGS / "fsdp2.yaml").read_text().replace("fsdp_auto_wrap_policy", "fsdp_auto_wrap_polcy"))
    with pytest.raises(AssertionError, match="fsdp_auto_wrap_polcy"):
        launch_arguments(file)


# ---- real trainings


def start(launcher: list[str], folder: Path, data: Path) -> subprocess.Popen:
    """A launcher in a session of its own, as on a machine of its own."""
    command = [*LAUNCH, *launcher, SCRIPT, *RECIPE, f"data.root={data}", f"output_dir={folder}"]
    environment = process_environment(ROOT, OMP_NUM_THREADS="1")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def finish(*launchers: subprocess.Popen) -> list[str]:
    """Outputs of launchers that must all succeed; none is left behind."""
    try:
        outputs = [launcher.communicate(timeout=120)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
    for launcher, output in zip(launchers, outputs, strict=True):
        assert launcher.returncode == 0, output
    return outputs


def losses(folder: Path) -> list[list[float]]:
    with (folder / "summary.csv").open() as opened:
        return [[float(row["train_loss"]), float(row["eval_loss"])] for row in csv.DictReader(opened)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_root):  # noqa: F811
    """Folder and outputs of: one process by cpu.yaml, two by cpu2.yaml, two launchers of one process each. All run at once."""
    folder, (port, other_port) = tmp_path_factory.mktemp("runs"), free_ports()
    pair = [
        "--multi_gpu",
        "--num_machines",
        "2",
        "--num_processes",
        "2",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    pair += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    launchers = [
        start(["--config_file", str(CONFIGS / "cpu.yaml")], folder / "cpu", data_root),
        start(
            ["--config_file", str(CONFIGS / "cpu2.yaml"), "--main_process_port", other_port], folder / "cpu2", data_root
        ),
        start([*pair, "--machine_rank", "0"], folder / "pair", data_root),
        start([*pair, "--machine_rank", "1"], folder / "pair", data_root),
    ]
    return folder, finish(*launchers)


def assert_alike(a: Path, b: Path) -> None:
    for row, other in zip(losses(a), losses(b), strict=True):
        assert row == pytest.approx(other, rel=1e-4)  # float32: gradients are summed in another order, over 3 epochs


def test_cpu_configs_start_the_processes_they_say(runs):
    folder, (one, two, *_) = runs
    assert "1 process(es) on cpu" in one
    assert "2 process(es) on cpu" in two
    assert_alike(folder / "cpu2", folder / "cpu")


def test_two_launchers_make_one_training(runs, data_root):  # noqa: F811
    folder, (*_, first, second) = runs
    assert "2 process(es) on cpu" in first
    assert "process(es)" not in second  # one log, on the first machine
    assert json.loads((folder / "pair" / "results.json").read_text())["processes"] == 2
    assert_alike(folder / "pair", folder / "cpu")
    other = folder / "other"
    assert train_main([*RECIPE, f"data.root={data_root}", f"output_dir={other}", "seed=1"]) == 0
    with pytest.raises(AssertionError):  # the tolerance tells two runs apart
        assert_alike(other, folder / "cpu")


# ---- the Slurm script, with stand-ins for srun, scontrol and the launcher

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
  show) printf 'node-a\\nnode-b\\n' ;;
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

    def begin(mode: str, *arguments: str) -> subprocess.Popen:
        given = arguments or ("--cfg", "imagenet/dense", f"output_dir={run}", "train.lr=1e-3")
        command = [shutil.which("bash"), str(ROOT / "experiments" / "slurm" / "train.sbatch"), *given]
        environment = {**os.environ, **{key: str(value) for key, value in variables.items()}, "MODE": mode}
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
