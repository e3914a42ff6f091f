"""Loaders: augmentation by image and epoch only, streamed sets counted once."""

import random

import numpy as np
import pytest
import torch

from tests.data.test_datasets import write_shards
from vit_tucker.config.schema import DataConfig, TrainConfig
from vit_tucker.data.datasets import dataset_info
from vit_tucker.data.loaders import build_loaders
from vit_tucker.data.seeding import derive_seed, seed_transforms
from vit_tucker.data.transforms import eval_transform, resolve_data, train_transform
from vit_tucker.errors import ConfigError

RESOLVED = {
    "input_size": (1, 8, 8),
    "mean": (0.3,),
    "std": (0.4,),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
AUGMENTED = DataConfig(scale=(0.5, 1.0), hflip=0.5, reprob=0.5, num_workers=0)


def build(data=AUGMENTED, rank=0, world_size=1, seed=0, resolved=RESOLVED, **train):
    recipe = TrainConfig(**{"global_batch_size": 16, **train})
    return build_loaders(data, recipe, resolved, seed, rank, world_size, pin_memory=False)


def first_step(loaders, epoch=0, start=0):
    return next(iter(loaders.train.steps(epoch, start)))


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_on_image_and_epoch_only(workers):
    alone = AUGMENTED.model_copy(update={"num_samples": 128})
    data = alone.model_copy(update={"num_workers": workers})
    ((images, labels, _),) = first_step(build(alone))
    ((again, same, _),) = first_step(build(data))
    assert torch.equal(images, again)
    assert torch.equal(labels, same)
    halves = [first_step(build(data, rank, 2))[0] for rank in (0, 1)]
    united = torch.cat([half[0] for half in halves])
    assert {x.numpy().tobytes() for x in united} == {x.numpy().tobytes() for x in images}
    ((other, *_),) = first_step(build(alone, seed=1))
    assert not torch.equal(images, other)
    ((later, *_),) = first_step(build(alone), epoch=1)
    assert not torch.equal(images, later)


def test_resuming_in_mid_epoch_gives_the_same_batches():
    data = AUGMENTED.model_copy(update={"num_samples": 128})
    whole = list(build(data).train.steps(2))
    rest = list(build(data).train.steps(2, 5))
    assert len(rest) == len(whole) - 5
    assert torch.equal(rest[0][0][0], whole[5][0][0])


def test_accumulation_groups_micro_batches():
    loaders = build(grad_accum_steps=4)
    step = first_step(loaders)
    assert [tuple(images.shape) for images, *_ in step] == [(4, 1, 8, 8)] * 4
    assert loaders.train.steps_per_epoch == 1437 // 16


def test_loading_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    first_step(build())
    assert (torch.rand(1), random.random(), np.random.rand()) == before  # noqa: NPY002
    seed_transforms(derive_seed(1, 2))
    drawn = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
    seed_transforms(derive_seed(1, 2))
    assert (torch.rand(1), random.random(), np.random.rand()) == drawn  # noqa: NPY002
    assert derive_seed(1, 2) != derive_seed(2, 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_streamed_evaluation_counts_each_image_once(tmp_path, workers, world_size):
    write_shards(tmp_path, sizes=(3, 2, 4))
    resolved = {**RESOLVED, "input_size": (3, 16, 16), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    data = DataConfig(dataset="wds/", root=str(tmp_path), num_workers=workers)
    reds = []
    for rank in range(world_size):
        loaders = build(data, rank, world_size, resolved=resolved, global_batch_size=6)
        assert loaders.num_eval is None
        reds += [round(x[0, 0, 0].item() * 255 / 20) for images, *_ in loaders.eval for x in images]
    assert sorted(reds) == list(range(9))


def test_streamed_training_has_the_promised_steps(tmp_path):
    write_shards(tmp_path, sizes=(6, 6))
    resolved = {**RESOLVED, "input_size": (3, 16, 16), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    data = DataConfig(dataset="wds/", root=str(tmp_path), num_workers=1)
    loaders = build(data, resolved=resolved, global_batch_size=4, grad_accum_steps=2)
    for epoch in (0, 1):
        assert [[len(labels) for _, labels, _ in step] for step in loaders.train.steps(epoch)] == [[2, 2]] * 3


@pytest.mark.parametrize("in_memory", [True, False])
def test_repeated_augmentation_shows_an_image_anew(in_memory):
    data = AUGMENTED.model_copy(update={"in_memory": in_memory, "num_samples": 128})
    repeated = data.model_copy(update={"aug_repeats": 4})
    ((images, labels, _),) = first_step(build(repeated))
    assert torch.equal(labels, labels[:4].repeat(4))
    assert len({x.numpy().tobytes() for x in images}) == 16  # 4 images, each in 4 ways
    ((once, _, _),) = first_step(build(data))
    assert torch.equal(images[:4], once[:4])  # the first way is that of a run without repeats
    halves = [first_step(build(repeated, rank, 2))[0].images for rank in (0, 1)]
    assert {x.numpy().tobytes() for x in torch.cat(halves)} == {x.numpy().tobytes() for x in images}
    ((same, _, _),) = first_step(build(data.model_copy(update={"aug_repeats": 1})))
    assert torch.equal(same, once)


def test_repeated_augmentation_of_a_stream_is_refused(tmp_path):
    write_shards(tmp_path, sizes=(6, 6))
    data = DataConfig(dataset="wds/", root=str(tmp_path), num_workers=0, aug_repeats=2)
    with pytest.raises(
        ConfigError, match=r"^data.aug_repeats=2: a streamed data set can't repeat its images; choose 0$"
    ):
        build(data, global_batch_size=4)
    with pytest.raises(ConfigError, match=r"^data.aug_repeats=3: train.global_batch_size=16 must be a multiple of it"):
        build(AUGMENTED.model_copy(update={"aug_repeats": 3}))


def test_batches_that_do_not_fit_are_a_config_error():
    with pytest.raises(ConfigError, match="larger than the 1437 training images"):
        build(global_batch_size=2000)


def test_normalisation_follows_weights_or_data(make_vit):
    model, info = make_vit(), dataset_info("digits")
    scratch = resolve_data(DataConfig(), info, model, False, (1, 16, 16))
    assert (scratch["mean"], scratch["std"]) == (info.mean, info.std)
    pretrained = resolve_data(DataConfig(), info, model, True, (3, 16, 16))
    assert pretrained["mean"] == model.pretrained_cfg["mean"]
    chosen = resolve_data(DataConfig(mean=(0.1,), crop_pct=0.8), info, model, True, (3, 16, 16))
    assert (chosen["mean"], chosen["crop_pct"]) == ((0.1,) * 3, 0.8)
    with pytest.raises(ConfigError, match="data.mean: 2 values for 3 channels"):
        resolve_data(DataConfig(mean=(0.1, 0.2)), info, model, True, (3, 16, 16))
    image = __import__("PIL.Image").Image.new("L", (16, 16), 255)
    white = eval_transform({**scratch, "crop_pct": 1.0})(image)
    assert white.shape == (1, 16, 16)
    assert white.mean().item() == pytest.approx((1 - info.mean[0]) / info.std[0], rel=1e-5)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", "3a", "augmix-m5-w2", "v0"])
def test_policies_run_at_every_magnitude(policy):
    """timm asks Pillow to keep 0 bits at some magnitudes, which newer ones refuse: such a run would end after some images."""
    from PIL import Image

    from vit_tucker.data.transforms import augment_ops, posterize, train_transform

    resolved = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    transform = train_transform(DataConfig(aa=policy), resolved)
    posterizers = [op for op in augment_ops(transform) if op.name.startswith("Posterize")]
    assert all(op.aug_fn is posterize for op in posterizers)
    assert bool(posterizers) == (policy != "3a")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8))
    for op in posterizers:
        op.magnitude, op.magnitude_std, op.prob = 10, 0.0, 1.0
        assert op(image).size == image.size
    assert transform(image).shape == (3, 16, 16)
    assert posterize(image, 8) is image
    assert np.array_equal(np.asarray(posterize(image, 0)), np.asarray(posterize(image, 1)))
    assert not np.array_equal(np.asarray(posterize(image, 1)), np.asarray(posterize(image, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aa": "ran-m9"}, "data.aa: timm has no policy 'ran-m9', known: .*; did you mean 'rand'"),
        ({"aa": "originall"}, "data.aa: .*; did you mean 'original'"),
        ({"aa": "rand-m9-x1"}, "data.aa: timm has no policy 'rand-m9-x1', known: rand-m9-mstd0.5-inc1"),
    ],
)
def test_policies_that_timm_does_not_know_are_refused(options, message):
    resolved = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(ConfigError, match=message):
        train_transform(DataConfig(**options), resolved)
    assert train_transform(DataConfig(aa="rand-m9-mstd0.5-inc1"), resolved)
