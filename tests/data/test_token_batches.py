"""Windows of tokens: the same batches for any number of processes and after a stop, and each token evaluated once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vit_tucker.config.schema import DataConfig, TrainConfig
from vit_tucker.data.token_batches import IGNORED, WindowOrder, build_token_loaders, calibration_windows, read_windows
from vit_tucker.data.token_files import TokenWriter
from vit_tucker.errors import ConfigError, DataError

TOKENS, BLOCK = 103, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Each token is its own place, so that windows can be recognised."""
    path = tmp_path_factory.mktemp("tokens")
    for split, count in (("train", TOKENS), ("validation", 38)):
        with TokenWriter(path, split, "places", 200) as writer:
            writer.write(range(count), count)
    return path


def loaders(folder, rank=0, world=1, seed=0, block=BLOCK, **recipe):
    data = DataConfig(dataset="tokens", root=str(folder))
    return build_token_loaders(data, TrainConfig(**{"global_batch_size": 4, **recipe}), block, seed, rank, world, False)


def starts(step) -> list[int]:
    return sorted(int(row[0]) for batch in step for row in batch.images)


def test_a_window_and_what_follows():
    inputs, targets = read_windows(np.arange(10, dtype=np.uint16), torch.tensor([0, 5, 8]), 4)
    assert inputs.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8], [8, 0, 0, 0]]
    assert targets.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9], [9, IGNORED, IGNORED, IGNORED]]
    assert inputs.dtype == targets.dtype == torch.long


@pytest.mark.parametrize("tokens", [9, 16, 17, 23, 24, 25, 103, 1000])
def test_a_pass_has_windows_that_do_not_overlap_and_passes_differ(tokens):
    order = WindowOrder(tokens, BLOCK, seed=3)
    for number in range(20):
        found = order.one_pass(number)
        assert len(found) == order.windows >= 1
        assert found.min() >= 0
        assert found.max() + BLOCK + 1 <= tokens
        assert (found.sort().values.diff() == BLOCK).all()
    if tokens > 24:
        assert not torch.equal(order.one_pass(0), order.one_pass(1))
        assert len({int(order.one_pass(n).min()) for n in range(20)}) > 3  # cut at other places


def test_windows_go_on_from_pass_to_pass():
    order = WindowOrder(TOKENS, BLOCK, seed=3)
    together = torch.cat([order.one_pass(0), order.one_pass(1), order.one_pass(2)])
    pieces = torch.cat([order.starts(first, 5) for first in range(0, 30, 5)])
    assert torch.equal(pieces, together[:30])
    assert order.windows == 11  # so that the pieces cross passes


@pytest.mark.parametrize(("world", "accumulation"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_any_number_of_processes_gets_the_same_batches(folder, world, accumulation):
    whole = [starts(step) for step in loaders(folder).train.steps(1)]
    shares = [list(loaders(folder, rank, world, grad_accum_steps=accumulation).train.steps(1)) for rank in range(world)]
    for number, expected in enumerate(whole):
        steps = [share[number] for share in shares]
        assert all(len(step) == accumulation for step in steps)
        assert sorted(start for step in steps for start in starts(step)) == expected
    assert [starts(step) for step in loaders(folder, seed=1).train.steps(1)] != whole


def test_a_stop_within_an_epoch_changes_nothing(folder):
    train = loaders(folder, steps_per_epoch=7).train
    for (after,), (whole,) in zip(train.steps(2, 4), list(train.steps(2))[4:], strict=True):
        assert torch.equal(after.images, whole.images)
        assert torch.equal(after.labels, whole.images + 1)


@pytest.mark.parametrize(("world", "batch"), [(1, 2), (2, 3), (3, 1), (8, 2)])
def test_each_token_is_evaluated_once(folder, world, batch):
    counted = torch.zeros(38, dtype=torch.long)
    for rank in range(world):
        evaluation = loaders(folder, rank, world, eval_batch_size=batch, global_batch_size=world).eval
        batches = list(evaluation)
        assert len(batches) == len(evaluation)
        for inputs, targets, _ in batches:
            kept = targets != IGNORED
            assert torch.equal(inputs[kept] + 1, targets[kept])
            counted += torch.bincount(targets[kept], minlength=38)
    assert counted.tolist() == [0] + [1] * 37
    assert loaders(folder).num_eval == 37


def test_impossible_sizes_are_refused(folder):
    with pytest.raises(DataError, match="103 tokens, and data.block_size=103 needs more"):
        loaders(folder, block=103)
    with pytest.raises(ConfigError, match=r"larger than the 11 windows of data.block_size=8 tokens.*steps_per_epoch"):
        loaders(folder, global_batch_size=12)
    assert loaders(folder, global_batch_size=12, steps_per_epoch=3).train.steps_per_epoch == 3
    with pytest.raises(ConfigError, match="can't be split evenly over 3 processes"):
        loaders(folder, world=3)


def test_windows_for_a_conversion(folder):
    data = DataConfig(dataset="tokens", root=str(folder))
    batches = list(calibration_windows(data, BLOCK, 5, 2, seed=0))
    assert [tuple(batch.shape) for batch in batches] == [(2, 8), (2, 8), (1, 8)]
    assert len({int(row[0]) for batch in batches for row in batch}) == 5
    with pytest.raises(DataError, match="calibration.images=12: .* has 11 windows of 8 tokens"):
        list(calibration_windows(data, BLOCK, 12, 2, seed=0))
