"""Bad images are named, counted, replaced in training and left out at evaluation, up to a limit."""

import multiprocessing
import sys
import time

import pytest
import torch
from PIL import Image

from vit_tucker.config.schema import DataConfig, TrainConfig
from vit_tucker.data.faults import FaultLog, fault_line
from vit_tucker.data.loaders import build_loaders
from vit_tucker.data.samples import calibration_images, evaluation_images
from vit_tucker.errors import DataError

RESOLVED = {"input_size": (3, 16, 16), "mean": (0.0,) * 3, "std": (1.0,) * 3}
RESOLVED |= {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
COUNT = 8
BAD = 3


def write_images(root, count=COUNT):
    """Image i of both splits is of the colour 20 * i, with a white column that flips can move."""
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        for i in range(count):
            image = Image.new("RGB", (16, 16), (20 * i, 0, 0))
            image.paste((255, 255, 255), (0, 0, 1, 16))
            image.save(root / split / "a" / f"{i}.png")
    return root


def damage(file, kind):
    content = file.read_bytes()
    if kind == "missing":
        file.unlink()
    else:
        file.write_bytes({"text": b"not an image", "empty": b"", "truncated": content[: len(content) // 2]}[kind])


def build(root, limit=0, workers=0, rank=0, world_size=1, batch=4, **data):
    config = DataConfig(
        **{"dataset": "folder", "root": str(root), "num_workers": workers, "max_bad_images": limit, **data}
    )
    recipe = TrainConfig(global_batch_size=batch)
    return build_loaders(config, recipe, RESOLVED, 0, rank, world_size, pin_memory=False)


def colours(images):
    """Which images: the red of a pixel that is never white."""
    return [round(x[0, 0, 8].item() * 255 / 20) for x in images]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_first_bad_image_stops_the_run_in_one_line(tmp_path, workers):
    for split in ("train", "val"):
        damage(write_images(tmp_path / split) / split / "a" / f"{BAD}.png", "text")
    train, evaluation = build(tmp_path / "train", workers=workers), build(tmp_path / "val", workers=workers)
    for steps, split, folder in ((train.train.steps(0), "train", "train"), (evaluation.eval, "validation", "val")):
        with pytest.raises(DataError) as caught:
            list(steps)
        path = tmp_path / folder / folder / "a" / f"{BAD}.png"
        assert str(caught.value).startswith(
            f"1 image could not be read, data.max_bad_images allows 0: {path} of split '{split}': UnidentifiedImageError: "
        )
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "missing"])
def test_training_replaces_it_and_leaves_all_others_alone(tmp_path, kind):
    whole = list(build(write_images(tmp_path), reprob=0.5).train.steps(1))
    bad = tmp_path / "train" / "a" / f"{BAD}.png"
    loaders = build(tmp_path, limit=1, reprob=0.5)  # opened while the image was there
    damage(bad, kind)
    steps = list(loaders.train.steps(1))
    for (good,), (batch,) in zip(whole, steps, strict=True):
        assert batch.images.shape == good.images.shape
        replaced = [i for i in range(4) if not torch.equal(good.images[i], batch.images[i])]
        assert len(replaced) == len(batch.faults)
    lines = [line for (batch,) in steps for line in batch.faults]
    assert len(lines) == 1
    assert lines[0].startswith(f"{bad} of split 'train': ")
    assert loaders.faults.lines == tuple(lines)


def test_the_replacement_is_the_next_readable_image_for_any_processes_and_on_resume(tmp_path):
    write_images(tmp_path)
    plain = build(tmp_path, no_aug=True)
    expected = [colours(batch.images) for (batch,) in plain.train.steps(0)]
    for index in (BAD, BAD + 1):
        damage(tmp_path / "train" / "a" / f"{index}.png", "text")
    options = {"limit": 2, "no_aug": True}
    found = [colours(batch.images) for (batch,) in build(tmp_path, **options).train.steps(0)]
    assert found == [[BAD + 2 if i in (BAD, BAD + 1) else i for i in step] for step in expected]
    resumed = [colours(batch.images) for (batch,) in build(tmp_path, **options, workers=1).train.steps(0, 1)]
    assert resumed == found[1:]
    halves = [list(build(tmp_path, **options, rank=rank, world_size=2).train.steps(0)) for rank in (0, 1)]
    united = [sorted(colours(a.images) + colours(b.images)) for (a,), (b,) in zip(*halves, strict=True)]
    assert united == [sorted(step) for step in found]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_bad_images_out_even_a_whole_batch(tmp_path, workers):
    write_images(tmp_path)
    for index in (0, 1, 5):
        damage(tmp_path / "val" / "a" / f"{index}.png", "truncated")
    loaders = build(tmp_path, limit=3, batch=2, workers=workers)
    batches = list(loaders.eval)
    assert [colours(batch.images) for batch in batches] == [[], [2, 3], [4], [6, 7]]
    assert batches[0].images.shape == (0, 3, 16, 16)
    assert (batches[0].labels.shape, batches[0].labels.dtype) == ((0,), torch.int64)
    assert [len(batch.faults) for batch in batches] == [2, 0, 1, 0]
    assert loaders.num_eval == COUNT
    list(loaders.eval)  # the same images again are no new ones
    assert len(loaders.faults) == 3
    with pytest.raises(
        DataError, match=r"2 images could not be read, data.max_bad_images allows 1: .*0.png.*; .*1.png"
    ):
        list(build(tmp_path, limit=1, batch=2, workers=workers).eval)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_without_any_readable_image_is_an_error(tmp_path, workers):
    write_images(tmp_path, count=4)
    for file in (tmp_path / "train" / "a").iterdir():
        damage(file, "empty")
    with pytest.raises(
        DataError, match=r"^none of the 4 images of split 'train' can be read: .*\.png of split"
    ) as caught:
        list(build(tmp_path, limit=100, workers=workers).train.steps(0))
    assert "\n" not in str(caught.value)


def test_images_of_subsets_and_other_readers_are_named(tmp_path):
    damage(write_images(tmp_path) / "train" / "a" / f"{BAD}.png", "text")
    cut = build(tmp_path, batch=7, num_samples=7, limit=1)
    list(cut.train.steps(0))
    folder = build(tmp_path, limit=1, dataset="torch/folder")
    list(folder.train.steps(0))
    for loaders in (cut, folder):
        assert [line.partition(" of split")[0] for line in loaders.faults.lines] == [
            str(tmp_path / "train" / "a" / f"{BAD}.png")
        ]


def test_calibration_skips_bad_images_up_to_the_limit(tmp_path):
    damage(write_images(tmp_path) / "train" / "a" / f"{BAD}.png", "text")
    config = DataConfig(dataset="folder", root=str(tmp_path), max_bad_images=1)
    found = [i for batch in calibration_images(config, RESOLVED, 7, 4, 0) for i in colours(batch)]
    assert sorted(found) == [i for i in range(COUNT) if i != BAD]
    with pytest.raises(DataError, match=rf"allows 0: .*{BAD}.png of split 'train'"):
        list(calibration_images(config.model_copy(update={"max_bad_images": 0}), RESOLVED, 8, 4, 0))


def test_a_sample_of_the_evaluation_split_names_that_split(tmp_path):
    damage(write_images(tmp_path) / "val" / "a" / f"{BAD}.png", "text")
    config = DataConfig(dataset="folder", root=str(tmp_path), max_bad_images=1)
    assert sum(len(images) for images, _ in evaluation_images(config, RESOLVED, COUNT, 4)) == COUNT - 1
    with pytest.raises(DataError, match=rf"allows 0: .*{BAD}.png of split 'validation'"):
        list(evaluation_images(config.model_copy(update={"max_bad_images": 0}), RESOLVED, COUNT, 4))


def read_in_process(root):
    """Exits as a command does: 2 and one line for bad data."""
    loaders = build(root, workers=2)
    try:
        list(loaders.train.steps(0))
    except DataError as error:
        print(error, flush=True)
        sys.exit(2)


def test_a_process_whose_worker_meets_a_bad_image_ends(tmp_path, capfd):
    """A forked process, which needs no imports, so that a delay of torch's 5 s would show."""
    damage(write_images(tmp_path) / "train" / "a" / f"{BAD}.png", "text")
    started = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=read_in_process, args=(tmp_path,))
    process.start()
    process.join(60)
    taken = time.monotonic() - started
    output = capfd.readouterr()
    assert process.exitcode == 2, output.err
    assert output.out.count("\n") == 1
    assert f"{BAD}.png of split 'train'" in output.out
    assert "Traceback" not in output.err
    assert taken < 20  # a hang would be the timeout


def test_the_log_counts_each_image_once_over_processes():
    log = FaultLog(3)
    assert log.add(["a", "b"]) == ("a", "b")
    assert log.add(["b"]) == ()
    assert log.merge([["a"], ["b", "c"]]) == ("c",)
    assert log.lines == ("a", "b", "c")
    with pytest.raises(DataError, match=r"^5 images could not be read, .* allows 3: a; b; c \(and 2 more\)$"):
        log.merge([["d"], ["e", "a"]])


def test_lines_are_the_same_in_every_process():
    lines = {
        fault_line("x.png", "train", OSError(f"can't read <BytesIO object at {hex(n)}>\nmore")) for n in (77, 1234)
    }
    assert lines == {"x.png of split 'train': OSError: can't read <BytesIO>"}
    assert fault_line("x", "val", EOFError()) == "x of split 'val': EOFError"
