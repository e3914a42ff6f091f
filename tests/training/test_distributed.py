"""Two real processes through `accelerate launch` against one: the same images, losses and scores."""

import csv
import gzip
import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import process_environment
from tests.data.test_datasets import idx

ROOT = Path(__file__).parents[2]
RECIPE = [
    "--cfg",
    "fashion_mnist/tucker_r16",
    "model.depth=1",
    "model.embed_dim=32",
    "data.num_workers=0",
    "train.epochs=3",
    "train.warmup_epochs=0.5",
    "train.global_batch_size=16",
    "train.mixup=0.5",
    "train.cutmix=0.5",
    "train.grad_accum_steps=2",
    "data.reprob=0.3",
    "train.cpu=true",
]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """Fashion-MNIST files with 72 training and 17 test images: an odd number, so that two processes share unevenly."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "fashion_mnist").mkdir()
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 72), ("t10k", 17)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = (generator.integers(0, 100, (count, 28, 28)) + 15 * labels[:, None, None]).astype(np.uint8)
        (folder / "fashion_mnist" / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / "fashion_mnist" / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return folder


def launch(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    """`accelerate launch` with that many processes; on a machine without GPUs they talk over gloo."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", "--num_processes", str(processes)]
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    launcher += ["--multi_gpu", "--main_process_port", str(port)] if processes > 1 else []
    command = [*launcher, str(ROOT / "experiments" / "train_vit.py"), *arguments]
    environment = process_environment(ROOT, OMP_NUM_THREADS="1")
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)


def train(processes: int, folder: Path, data_root: Path, *extra: str) -> tuple[dict, list[dict[str, str]]]:
    done = launch(processes, *RECIPE, f"data.root={data_root}", f"output_dir={folder}", *extra)
    assert done.returncode == 0, done.stderr
    with (folder / "summary.csv").open() as opened:
        return json.loads((folder / "results.json").read_text()), list(csv.DictReader(opened))


def test_one_and_two_processes_train_alike(tmp_path, data_root):
    one, one_rows = train(1, tmp_path / "one", data_root)
    two, two_rows = train(2, tmp_path / "two", data_root)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["data"]["num_eval"] == two["data"]["num_eval"] == 17
    for a, b in zip(one_rows, two_rows, strict=True):
        for key in ("train_loss", "eval_loss", "eval_top1", "eval_top5"):
            assert float(b[key]) == pytest.approx(float(a[key]), rel=1e-4), key  # float32, other orders of summation
        assert a["lr"] == b["lr"]  # the schedule counts optimizer steps, not processes
    _, other_rows = train(1, tmp_path / "other", data_root, "seed=1")  # the tolerance tells runs apart
    assert float(other_rows[-1]["train_loss"]) != pytest.approx(float(one_rows[-1]["train_loss"]), rel=1e-4)


def test_a_mistake_is_said_once_and_both_processes_end(tmp_path, data_root):
    done = launch(2, *RECIPE, f"data.root={data_root}", f"output_dir={tmp_path / 'x'}", "train.epoch=3")
    assert done.returncode != 0
    assert done.stderr.count("error: command line: train.epoch: unknown key; did you mean 'epochs'?") == 1
    assert not (tmp_path / "x").exists()
