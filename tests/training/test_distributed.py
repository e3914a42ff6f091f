"""One, two and four real processes, with and without accumulation: the same images, losses and scores."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.test_datasets import idx
from tests.training.processes import finish, saved_steps, start_all
from tests.training.rules import plugin

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


PENALTY = [f"plugins=[{Path(__file__).with_name('norm_penalty.py')}]", "train.penalties={normed_cores: 0.5}"]
"""Each process computes it: it must count once, as everything else does."""


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


def train(processes: int, folder: Path, data_root: Path, *extra: str) -> tuple[dict, list[dict[str, str]]]:
    """A run on that many processes, with the environment that torchrun gives them."""
    log = folder.with_suffix(".log")
    command = [*RECIPE, *PENALTY, f"data.root={data_root}", f"output_dir={folder}", *extra]
    statuses = finish(start_all(processes, command, log))
    assert statuses == [0] * processes, log.read_text()
    with (folder / "summary.csv").open() as opened:
        return json.loads((folder / "results.json").read_text()), list(csv.DictReader(opened))


@pytest.fixture(scope="module")
def one(tmp_path_factory, data_root):
    return train(1, tmp_path_factory.mktemp("one") / "run", data_root)


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 2), (4, 1)])
def test_any_number_of_processes_trains_alike(tmp_path, data_root, one, processes, accumulation):
    results, rows = train(processes, tmp_path / "run", data_root, f"train.grad_accum_steps={accumulation}")
    reference, expected_rows = one
    assert (reference["processes"], results["processes"]) == (1, processes)
    assert reference["data"]["num_eval"] == results["data"]["num_eval"] == 17  # no multiple of 2 or 4: all once
    for a, b in zip(expected_rows, rows, strict=True):
        for key in ("train_loss", "train_loss_normed_cores", "eval_loss", "eval_top1", "eval_top5"):
            assert float(b[key]) == pytest.approx(float(a[key]), rel=1e-4), key  # float32, other orders of summation
        assert a["lr"] == b["lr"]  # the schedule counts optimizer steps, not processes


def test_another_seed_is_outside_the_tolerance(tmp_path, data_root, one):
    _, rows = train(1, tmp_path / "run", data_root, "seed=1")
    assert float(rows[-1]["train_loss"]) != pytest.approx(float(one[1][-1]["train_loss"]), rel=1e-4)


def test_other_processes_go_on_where_some_stopped(tmp_path, data_root, one):
    """Two processes until step 7, in mid-epoch, then four: the same curve as one."""
    folder, log = tmp_path / "run", tmp_path / "log"
    file = tmp_path / "plugin.py"
    file.write_text(plugin("if trainer.progress.global_step == 6: os.kill(os.getpid(), signal.SIGTERM)"))
    command = [
        *RECIPE,
        f"data.root={data_root}",
        f"output_dir={folder}",
        f"plugins=[{file}, {Path(__file__).with_name('norm_penalty.py')}]",
        PENALTY[1],
        "train.step_rule=faulty",
        "train.grad_accum_steps=1",
    ]
    assert finish(start_all(2, command, log)) == [130, 130], log.read_text()
    assert 7 <= saved_steps(folder) <= 8  # all heard of it by the next step
    file.write_text(plugin("pass"))
    assert finish(start_all(4, command, log)) == [0] * 4, log.read_text()
    assert "on 4 process(es), before on 2: the same images and batches" in log.read_text()
    with (folder / "summary.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    for a, b in zip(one[1], rows, strict=True):
        assert float(b["train_loss"]) == pytest.approx(float(a["train_loss"]), rel=1e-4)


def test_a_mistake_is_printed_once_and_both_processes_end(tmp_path, data_root):
    log = tmp_path / "log"
    command = [*RECIPE, f"data.root={data_root}", f"output_dir={tmp_path / 'x'}", "train.epoch=3"]
    assert finish(start_all(2, command, log)) == [2, 2]
    assert log.read_text().count("error: command line: train.epoch: unknown key; did you mean 'epochs'?") == 1
    assert not (tmp_path / "x").exists()
