"""Runs sweeps with real processes on the embedded digits."""

import contextlib
import fcntl
import io
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from vit_tucker.cli.sweep import sweep_main
from vit_tucker.config.load import load_config
from vit_tucker.sweep.command import launch_arguments
from vit_tucker.sweep.plan import load_sweep
from vit_tucker.sweep.process import share_machine
from vit_tucker.sweep.status import last_words
from vit_tucker.training.lock import RunLock

pytestmark = pytest.mark.slow

FILE = """
title: A try
base: digits/base.yaml
output_dir: out
seeds: [0, 1]
set:
  model: {depth: 1, embed_dim: 32, num_heads: 4}
  train: {epochs: 1, warmup_epochs: 0, global_batch_size: 64}
  data: {num_samples: 128}
cells:
- {name: mha, attention: null}
- {name: gqa1, attention: {method: gqa, num_kv_heads: 1}}
"""


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    Path("s.yaml").write_text(FILE)


def sweep(*arguments):
    """Returns the exit status and the output of the command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = sweep_main(["--cfg", "s.yaml", *arguments])
    return status, out.getvalue()


def results(cell, seed):
    return json.loads(Path(f"out/{cell}/seed{seed}/results.json").read_text())


def written():
    return {f: f.stat().st_mtime_ns for f in Path("out").rglob("results.json")}


def test_all_runs_from_their_start_and_none_twice():
    status, text = sweep("--jobs", "2", "keep_checkpoints=false")
    assert status == 0, text
    assert "6 done" in text
    assert Path("out/sweep.yaml").read_text() == FILE
    for seed in (0, 1):
        mha, gqa = results("mha", seed), results("gqa1", seed)
        assert mha["config"]["model"]["checkpoint"] == f"out/start/seed{seed}"
        assert mha["curve"] == [mha["last"]]
        assert Path(f"out/start/seed{seed}/checkpoints/last").is_dir()
        assert not Path(f"out/gqa1/seed{seed}/checkpoints").exists()
        assert gqa["cost"]["flops"] < gqa["cost"]["dense_flops"] == mha["cost"]["flops"]
    assert results("mha", 0)["last"] != results("mha", 1)["last"]
    before = written()
    assert len(before) == 6
    status, text = sweep("--only", "gqa1")
    assert status == 0
    assert "4 done" in text
    assert written() == before


def test_a_failed_run_is_shown_and_the_others_go_on():
    Path("s.yaml").write_text(FILE.replace("num_kv_heads: 1}", "num_kv_heads: 1, calibration: {images: 999999}}"))
    status, text = sweep("seeds=[0]")
    assert status == 1
    assert "gqa1, seed 0: failed: status 2: " in text
    assert "out/gqa1/seed0.log" in text
    assert "2 done, 1 failed" in text
    assert results("mha", 0)["finished"]
    assert not Path("out/gqa1/seed0/results.json").exists()


def test_what_starts_from_a_failed_run_is_blocked():
    status, text = sweep("seeds=[0]", "start.model.checkpoint=nowhere")
    assert status == 1
    assert "start, seed 0: failed: status 2: model.checkpoint: nowhere" in text
    assert "1 failed, 2 blocked" in text


def test_a_stopped_sweep_goes_on_with_the_same_command():
    command = ["seeds=[0]", "--only", "mha", "start.train.epochs=8", "set.train.checkpoint_epochs=1000"]

    def stop():
        while not list(Path("out/start/seed0").glob("summary.csv")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    status, text = sweep(*command)
    stopper.join()
    assert status == 130, text
    assert "SIGTERM" in text
    assert "1 interrupted" in text
    rows = len(Path("out/start/seed0/summary.csv").read_text().splitlines()) - 1
    assert 0 < rows < 8
    status, text = sweep(*command, "--dry-run")
    assert status == 0
    assert f"|{rows}/8" in text
    status, text = sweep("seeds=[0]", "--only", "mha", "start.train.epochs=9")
    assert status == 2
    assert "holds a run with another config: train.epochs: 8 -> 9" in text
    Path("out/start/seed0.log").unlink()
    status, text = sweep("seeds=[0]", "--only", "start", *command[3:])
    assert status == 0
    assert "epoch 1/8 " not in Path("out/start/seed0.log").read_text()
    assert results("start", 0)["epochs"] == 8


def test_a_run_of_another_sweep_is_left_to_it():
    (job, *_) = load_sweep("s.yaml", ["seeds=[0]"]).jobs
    job.log.parent.mkdir(parents=True)
    with job.log.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        status, text = sweep("seeds=[0]")
    assert status == 1
    assert "start, seed 0: elsewhere: another sweep runs it" in text
    assert not Path("out/start/seed0").exists()
    lock = RunLock(job.folder)  # of a run that was started by hand
    lock.take()
    status, text = sweep("seeds=[0]", "--only", "start")
    lock.release()
    assert status == 1
    assert (
        f"start, seed 0: elsewhere: output_dir: out/start/seed0 is being written by process {os.getpid()} on " in text
    )
    assert list(job.folder.iterdir()) == []


def test_recorded_runs_are_done_without_their_folders(tmp_path):
    assert sweep("seeds=[0]")[0] == 0
    with Path("kept.jsonl").open("w") as kept:
        for cell in ("start", "mha"):
            kept.write(json.dumps(results(cell, 0)) + "\n")
    Path("out").rename("gone")
    status, text = sweep("seeds=[0]", "--done", "kept.jsonl", "--dry-run")
    assert "1 done, 2 waiting" in text  # gqa1 needs the start's weights, which are gone
    status, text = sweep("seeds=[0]", "--done", "kept.jsonl", "--dry-run", "--only", "mha")
    assert "2 done" in text
    status, text = sweep("seeds=[0]", "--done", "kept.jsonl", "finetune.train.lr=2e-4")
    assert status == 2
    assert "--done: mha, seed 0 was recorded with another config: train.lr: 0.0015 -> 0.0002" in text
    assert sweep("--done", "none.jsonl") == (2, "error: --done: none.jsonl: no such file or folder\n")
    Path("kept.jsonl").write_text("{}\n")
    assert sweep("--done", "kept.jsonl") == (
        2,
        "error: --done: kept.jsonl, line 1: not the results of a run: no 'name'\n",
    )


def test_a_launcher_starts_the_runs_when_asked(monkeypatch):
    """Checks the command alone; tests/training/test_launch.py trains with launchers."""
    started = []

    class Launched:
        pid, returncode = os.getpid(), 1

        def __init__(self, command, stdout, stderr, env, start_new_session):
            started.append((command, start_new_session))
            stdout.write(b"error: no such luck\n")

        def poll(self):
            return 1

    monkeypatch.setattr("vit_tucker.sweep.process.subprocess.Popen", Launched)
    status, text = sweep("seeds=[0]", "--only", "start", "--launch", "--multi_gpu --num_processes 2")
    assert status == 1
    assert "start, seed 0: failed: status 1: no such luck" in text
    ((command, own_session),) = started
    assert own_session
    assert command[1:6] == ["-m", "vit_tucker.cli.launch", "--multi_gpu", "--num_processes", "2"]
    assert command[6] == "--main_process_port"
    assert command[8].endswith("experiments/train_vit.py")
    assert command[9:] == ["--cfg", "out/start/seed0.yaml"]
    assert load_config("out/start/seed0.yaml").output_dir == "out/start/seed0"


def test_machine_is_shared():
    assert share_machine(2, None, ["0", "1"]).gpus == ("0", "1")
    assert share_machine(1, None, ["0", "1"]).gpus == ()  # one run sees them all
    assert share_machine(2, "--multi_gpu", ["0", "1"]).gpus == ()
    assert share_machine(10**6, None, []).threads == 1
    assert launch_arguments("--num_processes 2 --main_process_port 5")[-1] == "5"
    assert launch_arguments("--num_processes 2")[-2] == "--main_process_port"


def test_last_words(tmp_path):
    log = tmp_path / "log"
    log.write_text("epoch 1\nerror: the disk is full\nmore\n\n")
    assert last_words(log) == "the disk is full"
    log.write_text("epoch 1\nKilled\n")
    assert last_words(log) == "Killed"
    assert last_words(tmp_path / "none") == ""
    log.write_text("error: of the run before\nKilled\n")
    assert last_words(log, len("error: of the run before\n")) == "Killed"
