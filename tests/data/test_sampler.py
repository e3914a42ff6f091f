"""The same images at the same step for any number of processes; each evaluation image once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vit_tucker.data.sampler import EvalSampler, TrainSampler, shard
from vit_tucker.data.seeding import derive_seed
from vit_tucker.errors import ConfigError


def steps(world_size, accumulation=1, epoch=0, start=0, num=50, batch=8, seed=0):
    """Index sets of each step, united over processes and micro-batches."""
    iterators = []
    for rank in range(world_size):
        sampler = TrainSampler(num, batch, seed, rank, world_size, accumulation)
        sampler.set_position(epoch, start)
        assert len(list(sampler)) == len(sampler)
        iterators.append(list(sampler))
    count = len(iterators[0]) // accumulation
    return [
        sorted(
            i for rank in iterators for micro in rank[s * accumulation : (s + 1) * accumulation] for _, i, _ in micro
        )
        for s in range(count)
    ]


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 2), (2, 1), (2, 2), (4, 1), (8, 1)])
def test_steps_hold_the_same_images_for_any_split(world_size, accumulation):
    assert steps(world_size, accumulation) == steps(1)
    assert steps(world_size, accumulation, start=3) == steps(1)[3:]
    assert steps(world_size, epoch=1) != steps(1)
    assert steps(world_size, seed=1) != steps(1)


def test_an_epoch_has_no_image_twice():
    seen = [i for step in steps(2) for i in step]
    assert len(seen) == len(set(seen)) == 48  # 50 images, batches of 8, the incomplete one dropped


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_mirrored_shards_keep_the_pairs_of_mixup(shards):
    """timm's mixup pairs image i of a batch with image n-1-i: the same pairs whether the batch is split or not."""
    batch = torch.arange(16)
    whole = {frozenset(p) for p in zip(batch.tolist(), batch.flip(0).tolist(), strict=True)}
    parts = [shard(batch, number, shards) for number in range(shards)]
    assert sorted(torch.cat(parts).tolist()) == batch.tolist()
    pairs = {frozenset(p) for part in parts for p in zip(part.tolist(), part.flip(0).tolist(), strict=True)}
    assert pairs == whole
    contiguous = [frozenset(p) for p in zip(range(8), reversed(range(8)), strict=True)]
    assert shards == 1 or not whole >= set(contiguous)  # plain slices would pair others


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 5))
def test_evaluation_counts_each_image_once(num, batch_size, world_size):
    batches = [list(EvalSampler(num, batch_size, rank, world_size)) for rank in range(world_size)]
    seen = [i for rank in batches for batch in rank for _, i, _ in batch]
    assert sorted(seen) == list(range(num))
    assert all(len(batch) <= batch_size for rank in batches for batch in rank)


def test_impossible_batches_are_refused():
    with pytest.raises(
        ConfigError, match="global_batch_size=9 can't be split evenly over 2 processes x 2 accumulation"
    ):
        TrainSampler(50, 9, 0, 0, 2, 2)
    with pytest.raises(ConfigError, match="global_batch_size=64 is larger than the 50 training images"):
        TrainSampler(50, 64, 0, 0, 1, 1)
    with pytest.raises(ConfigError, match=r"data.aug_repeats=3: train.global_batch_size=8 must be a multiple of it"):
        TrainSampler(50, 8, 0, 0, 1, 1, repeats=3)


def keys(rank=0, world_size=1, accumulation=1, repeats=1, epoch=0, start=0, batch=12):
    sampler = TrainSampler(50, batch, 0, rank, world_size, accumulation, repeats)
    sampler.set_position(epoch, start)
    return list(sampler)


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeats_of_an_image_are_in_one_batch_of_an_epoch_as_long_as_without(repeats):
    steps = keys(repeats=repeats)
    assert len(steps) == len(keys()) == 50 // 12
    for step in steps:
        images = {index for _, index, _ in step}
        assert sorted(step) == [(0, index, number) for index in sorted(images) for number in range(repeats)]
        assert len(images) == 12 // repeats
    drawn = [index for step in steps for index in {index for _, index, _ in step}]
    assert len(drawn) == len(set(drawn))
    pairs = [(a[1], b[1]) for step in keys(repeats=2) for a, b in zip(step[:6], reversed(step[6:]), strict=True)]
    assert all(a != b for a, b in pairs)  # an even number of images: mixup mixes none with itself


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (1, 2), (2, 3)])
def test_repeats_are_the_same_for_any_split_and_on_resume(world_size, accumulation):
    whole = keys(repeats=3, epoch=1)
    parts = [keys(rank, world_size, accumulation, repeats=3, epoch=1) for rank in range(world_size)]
    for number, step in enumerate(whole):
        micro = slice(number * accumulation, (number + 1) * accumulation)
        assert sorted(key for rank in parts for part in rank[micro] for key in part) == sorted(step)
    assert keys(repeats=3, epoch=1, start=2) == whole[2:]


def test_one_repeat_is_the_order_without():
    generator = torch.Generator().manual_seed(derive_seed(0, 1, 0))
    order = torch.randperm(50, generator=generator)[:48].tolist()
    assert [key for step in keys(epoch=1) for key in step] == [(1, index, 0) for index in order]
