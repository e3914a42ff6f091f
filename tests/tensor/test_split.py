"""Heads' matrices cut to a width, against the SVD of the matrices themselves."""

import pytest
import torch

from vit_tucker.tensor.split import split_width
from vit_tucker.tensor.tucker import Pairs


def pairs(width: int, rows: int = 9, columns: int = 7) -> Pairs:
    g = torch.Generator().manual_seed(width)
    left, right = (torch.randn(3, size, width, generator=g, dtype=torch.float64) for size in (rows, columns))
    return Pairs(left, right)


@pytest.mark.parametrize("width", [1, 3, 6, 12])
@pytest.mark.parametrize("wanted", [2, 5, 8])
def test_it_is_the_truncated_svd(width, wanted):
    tensor = pairs(width)
    result = split_width(tensor, wanted, 1e-9)
    values = torch.linalg.svdvals(tensor.dense())
    assert result.pairs.left.shape == (3, 9, wanted)
    assert result.pairs.right.shape == (3, 7, wanted)
    assert result.ranks == [min(width, 7)] * 3
    lost = (tensor.dense() - result.pairs.dense()).norm() / tensor.dense().norm()
    least = values[:, wanted:].norm() / values.norm()
    assert lost.item() == pytest.approx(least.item(), abs=1e-12)
    assert result.error == pytest.approx(least.item(), abs=1e-12)
    assert (lost > 1e-2) == (wanted < min(width, 7)), "a cut must be seen"


def test_both_factors_carry_the_same():
    left, right = split_width(pairs(4), 4, 1e-9).pairs
    torch.testing.assert_close(left.square().sum(1), right.square().sum(1))


def test_a_head_of_zeros():
    tensor = pairs(3)
    tensor.left[1] = 0
    result = split_width(tensor, 2, 1e-9)
    assert result.ranks == [3, 0, 3]
    assert not result.pairs.dense()[1].any()
