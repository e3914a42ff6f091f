"""Streamed sets: an epoch is the same whenever it is read, bad samples are named and left out."""

import io
import tarfile

import pytest
import torch
from PIL import Image

from tests.data.test_datasets import write_folder, write_shards
from vit_tucker.config.schema import DataConfig, TrainConfig
from vit_tucker.data.loaders import build_loaders
from vit_tucker.data.streams import StreamReader
from vit_tucker.errors import DataError

RESOLVED = {"input_size": (3, 16, 16), "mean": (0.0,) * 3, "std": (1.0,) * 3}
RESOLVED |= {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}


def build(
    root,
    workers=0,
    rank=0,
    world_size=1,
    batch=4,
    limit=0,
    seed=0,
    accumulation=1,
    dataset="wds/",
    with_train=True,
    num_classes=None,
    **data,
):
    options = {"dataset": dataset, "root": str(root), "num_workers": workers, "max_bad_images": limit, "reprob": 0.5}
    recipe = TrainConfig(global_batch_size=batch, grad_accum_steps=accumulation)
    return build_loaders(
        DataConfig(**{**options, **data}),
        recipe,
        RESOLVED,
        seed,
        rank,
        world_size,
        False,
        with_train,
        num_classes=num_classes,
    )


def equal(a, b):
    """Two lists of steps, bit for bit."""
    pairs = [(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True)]
    return all(torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) for x, y in pairs)


def reds(batches):
    return sorted(round(x[0, 0, 0].item() * 255 / 20) for batch in batches for x in batch.images)


@pytest.mark.parametrize(("workers", "rank", "world_size"), [(0, 0, 1), (2, 1, 2)])
def test_an_epoch_goes_on_exactly_in_a_new_process_state(tmp_path, workers, rank, world_size):
    write_shards(tmp_path, sizes=(6, 6, 6, 6))

    def fresh(**options):
        return build(tmp_path, workers, rank, world_size, accumulation=2, **options).train

    running = fresh()
    first, second = list(running.steps(0)), list(running.steps(1))  # persistent workers that have read an epoch before
    assert len(first) == len(second) == 6
    assert equal(list(fresh().steps(1)), second)
    assert equal(list(fresh().steps(1, 3)), second[3:])
    assert equal(list(running.steps(0, 4)), first[4:])  # back again
    # what must differ does: epochs, seeds, processes
    assert not equal(first, second)
    assert not equal(list(fresh(seed=1).steps(0)), first)
    if world_size > 1:
        assert not equal(list(build(tmp_path, workers, 0, world_size, accumulation=2).train.steps(0)), first)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_map_style_epoch_goes_on_exactly_in_a_new_process_state(tmp_path, workers):
    write_folder(tmp_path, count=8)

    def fresh():
        return build(tmp_path, workers, dataset="folder").train

    running = fresh()
    first, second = list(running.steps(0)), list(running.steps(1))
    assert equal(list(fresh().steps(1, 2)), second[2:])
    assert equal(list(running.steps(0, 1)), first[1:])
    assert not equal(first, second)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_hugging_face_stream_goes_on_exactly(tmp_path, workers):
    write_folder(tmp_path / "images", splits=("train", "test"), count=8)
    # 'download' makes the reader cut a local set into as many shards as there are workers
    options = {"dataset": f"hfids/{tmp_path}/images", "val_split": "test", "download": True}
    options |= {"dataset_kwargs": {"num_samples": 16}}

    def fresh():
        return build(tmp_path / "cache", workers, **options).train

    running = fresh()
    first, second = list(running.steps(0)), list(running.steps(1))
    assert len(first) == 4
    assert equal(list(fresh().steps(1, 2)), second[2:])
    assert not equal(first, second)


@pytest.mark.parametrize(("workers", "world_size", "download"), [(0, 1, True), (2, 2, False)])
def test_num_samples_of_a_hugging_face_stream_are_its_first_ones(tmp_path, workers, world_size, download):
    write_folder(
        tmp_path / "images", splits=("train", "test"), count=8
    )  # 8 of class 0, then 8 of class 1; 10 * i in green
    options = {"dataset": f"hfids/{tmp_path}/images", "val_split": "test", "download": download}
    options |= {"num_samples": 8, "no_aug": True, "reprob": 0.0}

    def epoch(number, rank, start=0):
        loaders = build(tmp_path / "cache", workers, rank, world_size, **options)
        assert (loaders.train.num_samples, loaders.train.steps_per_epoch) == (8, 2)
        batches = [batch for step in loaders.train.steps(number, start) for batch in step]
        loaders.close()
        return [
            [(int(y), round(x[1, 0, 0].item() * 25.5)) for x, y in zip(b.images, b.labels, strict=True)]
            for b in batches
        ]

    first, second = ([epoch(number, rank) for rank in range(world_size)] for number in (0, 1))
    for processes in (first, second):
        assert sorted(sample for batches in processes for batch in batches for sample in batch) == [
            (0, i) for i in range(8)
        ]
    assert first != second
    assert epoch(1, world_size - 1, 1) == second[-1][1:]


def test_a_hugging_face_stream_without_a_size_says_so(tmp_path):
    write_folder(tmp_path / "images", splits=("train", "test"), count=2)
    options = {"dataset": f"hfids/{tmp_path}/images", "val_split": "test"}
    with pytest.raises(
        DataError, match=r"^the stream of split 'train' does not state its number of images.*=\{num_samples: ...\}$"
    ):
        build(tmp_path / "cache", **options)
    assert build(tmp_path / "cache", **options, num_samples=4).train.num_samples == 4
    assert sum(len(batch.labels) for batch in build(tmp_path / "cache", with_train=False, **options).eval) == 4


def test_labels_of_other_readers_are_checked_too():
    class Reader:
        """timm's reader of TFDS yields (image, label)."""

        reader = None

        def __iter__(self):
            return iter([("image", 1), ("image", 2)])

    with pytest.raises(DataError, match="^split 'train': label 2 of image 1 of the stream, but there are 2 classes"):
        list(StreamReader(Reader(), "train", 0, num_classes=2).read())
    assert len(list(StreamReader(Reader(), "train", 0, num_classes=3).read())) == 2


def damage_sample(root, split, number, shard=0):
    """Write the shard anew with one image that is text."""
    file = root / f"{split}-{shard:04d}.tar"
    with tarfile.open(file) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            data = b"not an image" if name == f"sample{number:04d}.png" else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_of_a_webdataset(tmp_path, workers):
    write_shards(tmp_path, sizes=(4, 4))
    for split in ("train", "validation"):
        damage_sample(tmp_path, split, 2)
    strict = build(tmp_path, workers)
    line = rf"sample0002 in {tmp_path}/%s-0000.tar of split '%s': UnidentifiedImageError: cannot identify image file"
    for steps, split in ((strict.train.steps(0), "train"), (strict.eval, "validation")):
        with pytest.raises(DataError, match=rf"^1 image could .* allows 0: {line % (split, split)}") as caught:
            list(steps)
        assert "\n" not in str(caught.value)
    lenient = build(tmp_path, workers, limit=2, reprob=0.0, no_aug=True)
    steps = list(lenient.train.steps(0))
    assert [len(batch.labels) for (batch,) in steps] == [4, 4]  # the reader goes on until it has enough
    assert 2 not in reds([batch for (batch,) in steps])
    batches = list(lenient.eval)
    assert reds(batches) == [0, 1, 3, 4, 5, 6, 7]
    assert len(lenient.faults) == 2
    list(lenient.train.steps(1))
    assert len(lenient.faults) == 2  # the same image again
    lenient.close()


def test_a_torn_shard_is_named(tmp_path):
    write_shards(tmp_path, sizes=(4, 4))
    shard = tmp_path / "validation-0001.tar"
    shard.write_bytes(shard.read_bytes()[:2560])  # one sample whole, the next one cut in its image
    loaders = build(tmp_path, limit=1)
    assert reds(list(loaders.eval))[:5] == [0, 1, 2, 3, 4]
    assert len(loaders.faults) == 1
    assert loaders.faults.lines[0].startswith(f"the rest of shard {shard} of split 'validation': ")
    shard.unlink()
    with pytest.raises(DataError, match=rf"the rest of shard {shard} of split 'validation': FileNotFoundError: ."):
        list(build(tmp_path).eval)


def test_evaluation_reports_bad_samples_at_the_very_end_and_on_each_process(tmp_path):
    write_shards(tmp_path, sizes=(3, 2))
    damage_sample(tmp_path, "validation", 4, shard=1)
    found = []
    for rank in (0, 1):
        loaders = build(tmp_path, rank=rank, world_size=2, limit=1)
        found += list(loaders.eval)
        assert len(loaders.faults) == 1
    assert reds(found) == [0, 1, 2, 3]


def test_bad_images_of_a_hugging_face_stream(tmp_path):
    write_folder(tmp_path / "images", splits=("train", "test"), count=3)
    bad = tmp_path / "images" / "test" / "n01" / "1.JPEG"
    bad.write_bytes(b"not an image")
    options = {"dataset": f"hfids/{tmp_path}/images", "val_split": "test", "dataset_kwargs": {"num_samples": 6}}
    with pytest.raises(DataError, match=rf"allows 0: .*{bad} of split 'test': UnidentifiedImageError"):
        list(build(tmp_path / "cache", **options).eval)
    loaders = build(tmp_path / "cache", limit=1, **options)
    assert sum(len(batch.labels) for batch in loaders.eval) == 5
    assert len(loaders.faults) == 1


def test_a_stream_without_images_ends_in_one_line(tmp_path):
    write_folder(tmp_path / "images", splits=("train", "test"), count=2)
    for file in (tmp_path / "images" / "train").rglob("*.JPEG"):
        file.write_bytes(b"not an image")
    options = {"dataset": f"hfids/{tmp_path}/images", "val_split": "test", "dataset_kwargs": {"num_samples": 4}}
    loaders = build(tmp_path / "cache", limit=100, **options)
    with pytest.raises(
        DataError, match=r"^the stream of split 'train' has no images for this process or loader worker; "
    ):
        list(loaders.train.steps(0))


def test_images_of_a_stream_are_what_the_file_holds(tmp_path):
    write_shards(tmp_path, sizes=(3, 2))
    with tarfile.open(tmp_path / "validation-0000.tar") as tar:
        stored = Image.open(io.BytesIO(tar.extractfile("sample0002.png").read()))
    (batch,) = list(build(tmp_path, batch=5).eval)
    assert (batch.images[2] * 255).round().to(torch.uint8)[:, 0, 0].tolist() == list(stored.getpixel((0, 0)))
