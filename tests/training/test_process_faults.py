"""Faults that real processes meet: one that dies, hangs or finds a mistake; images that can't be read; exit statuses."""

import json
import time

import numpy as np
import pytest
from PIL import Image

from tests.training.processes import finish, saved_steps, start, start_all
from tests.training.rules import plugin
from tests.training.test_faults import WILD

FAULTY = "train.step_rule=faulty"


def failing(action: str) -> str:
    """Text of a plug-in in which the second process does something before its fourth step."""
    return plugin(f"if os.environ.get('RANK') == '1' and trainer.progress.global_step == 3: {action}")


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("raise RuntimeError('out of tokens')", "process 1 failed: RuntimeError: out of tokens"),
        ("os.kill(os.getpid(), 9)", "process 0 failed: "),
    ],
    ids=["an error", "a kill"],
)
def test_a_process_that_dies_ends_the_run_and_is_in_the_log(tmp_path, action, said):
    folder, log = tmp_path / "run", tmp_path / "log"
    (tmp_path / "plugin.py").write_text(failing(action))
    arguments = ["--cfg", "digits/tucker_r16", "model.depth=1", "model.embed_dim=32", "attention.ranks=[3, 8, 8]"]
    arguments += [
        "train.cpu=true",
        f"plugins=[{tmp_path}/plugin.py]",
        FAULTY,
        f"output_dir={folder}",
        "train.timeout_minutes=0.5",
    ]
    before = time.monotonic()
    first, second = finish(start_all(2, arguments, log))
    assert first not in (0, None), log.read_text()  # rank 0 noticed, it did not wait for ever
    assert second not in (0, None)
    assert time.monotonic() - before < 60
    assert said in (folder / "train.log").read_text()
    if "kill" not in action:
        assert "Traceback (most recent call last):" in (folder / "train.log").read_text()  # of the second process
        assert (
            "error: process 1: RuntimeError: out of tokens" in log.read_text()
        )  # the first process says whose fault it was
    assert saved_steps(folder) == 0


def test_a_process_that_hangs_ends_the_run_within_the_timeout(tmp_path):
    log = tmp_path / "log"
    (tmp_path / "plugin.py").write_text(failing("os.kill(os.getpid(), 19)"))  # SIGSTOP
    arguments = ["--cfg", "digits/tucker_r16", "model.depth=1", "model.embed_dim=32", "attention.ranks=[3, 8, 8]"]
    arguments += ["data.num_samples=320", "train.cpu=true", "train.timeout_minutes=0.075"]
    arguments += [f"plugins=[{tmp_path}/plugin.py]", FAULTY, f"output_dir={tmp_path}/run"]
    processes = start_all(2, arguments, log)
    (first,) = finish(processes[:1], seconds=60)
    assert first == 1, log.read_text()
    assert processes[1].is_alive()  # it was the timeout that ended the first
    finish(processes[1:], seconds=0)
    said = (tmp_path / "run" / "train.log").read_text()
    assert "process 0 failed: " in said
    assert "4500ms" in said.splitlines()[-1]


def test_a_mistake_that_one_process_meets_in_its_set_up_is_everyones(tmp_path):
    """A penalty fails on one machine: all end with status 2, and the first says which process it was."""
    log = tmp_path / "log"
    (tmp_path / "plugin.py").write_text(
        "import os\nimport torch\nimport vit_tucker\n@vit_tucker.register_penalty('missing')\ndef missing(model):\n"
        "    if os.environ.get('RANK') == '1': raise FileNotFoundError('no such folder')\n    return torch.zeros(())\n"
    )
    arguments = [
        "--cfg",
        "digits/dense",
        "train.cpu=true",
        f"plugins=[{tmp_path}/plugin.py]",
        "train.penalties={missing: 1}",
        f"output_dir={tmp_path}/run",
    ]
    assert finish(start_all(2, arguments, log)) == [2, 2], log.read_text()
    assert log.read_text().count("error: process 1: train.penalties.missing: FileNotFoundError: no such folder") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_from_the_command_line_fails_with_status_one(tmp_path):
    arguments = ["--cfg", "digits/dense", "model.depth=1", "model.embed_dim=32", *WILD, f"output_dir={tmp_path}/run"]
    assert finish([start(arguments, tmp_path / "log")]) == [1]
    assert (tmp_path / "log").read_text().splitlines()[-1].startswith("error: the loss is ")


@pytest.fixture
def folder_of_images(tmp_path):
    """48 training images in two classes, three of them bad; 17 to evaluate, two of them bad."""
    generator = np.random.default_rng(0)
    for split, count, bad in (("train", 24, {"a/03", "a/07", "b/11"}), ("validation", 9, {"a/01", "b/02"})):
        for label, shade in (("a", 0), ("b", 120)):
            for number in range(count - (split == "validation" and label == "b")):
                file = tmp_path / "data" / split / label / f"{number:02d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = generator.integers(shade, shade + 130, (20, 20, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(file)
                if f"{label}/{number:02d}" in bad:
                    file.write_bytes(file.read_bytes()[:60])
    return tmp_path / "data"


IMAGES = ["--cfg", "digits/dense", "data.dataset=folder", "model.num_classes=2", "model.in_chans=3", "model.depth=1"]
IMAGES += [
    "model.embed_dim=32",
    "train.global_batch_size=8",
    "train.epochs=2",
    "train.warmup_epochs=0",
    "data.num_workers=1",
]
IMAGES += ["train.cpu=true", "data.mean=[0.5]", "data.std=[0.5]"]


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_images_are_named_counted_and_skipped_up_to_the_limit(tmp_path, folder_of_images, processes):
    """Two processes meet some each; all are known to both, and the curve is that of one process."""
    for name, limit in (("enough", 5), ("few", 4)):
        arguments = [*IMAGES, f"data.root={folder_of_images}", f"data.max_bad_images={limit}"]
        log = tmp_path / f"{name}.log"
        statuses = finish(start_all(processes, [*arguments, f"output_dir={tmp_path / name}"], log))
        said = log.read_text()
        if name == "enough":
            assert statuses == [0] * processes, said
            results = json.loads((tmp_path / "enough" / "results.json").read_text())
            names = sorted(line.partition(".png")[0][-4:] for line in results["bad_images"])
            assert names == ["a/01", "a/03", "a/07", "b/02", "b/11"]
            assert said.count("bad image ") == 5
            assert "bad image 5 of at most 5: " in said
            assert round(results["last"]["eval_top1"] * 15 / 100, 6).is_integer()  # of 17 images, 15 can be read
        else:
            assert set(statuses) == {2}, said
            assert "5 images could not be read, data.max_bad_images allows 4: " in said
            assert "Traceback" not in said
    if processes == 2:
        one = finish(
            [start([*arguments[:-1], "data.max_bad_images=5", f"output_dir={tmp_path}/one"], tmp_path / "log")]
        )
        assert one == [0]
        losses = [
            (tmp_path / name / "summary.csv").read_text().splitlines()[-1].split(",")[1] for name in ("enough", "one")
        ]
        assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-4)  # float32, other orders of summation


def test_a_bad_image_stops_a_run_that_allows_none(tmp_path, folder_of_images):
    arguments = [*IMAGES, f"data.root={folder_of_images}", f"output_dir={tmp_path}/run"]
    before = time.monotonic()
    assert finish([start(arguments, tmp_path / "log")]) == [2]
    assert time.monotonic() - before < 20
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("error: 1 image could not be read, data.max_bad_images allows 0: ")
    assert ".png of split 'train': " in last
