"""Where tokens lie: against timm's own partitions of a picture of coordinates, and by hand."""

import pytest
import torch
from timm.models import maxxvit, swin_transformer

from vit_tucker.explain.grid import PADDING, patch_numbers, strided_grid, whole_grid, window_grid


def picture(height, width):
    """(1, H, W, 1): each place holds its number + 1, so that padding, 0, can be told."""
    return (patch_numbers(height, width) + 1).double().view(1, height, width, 1)


def partitioned(x, window):
    return swin_transformer.window_partition(x, window).flatten(1).long() - 1


@pytest.mark.parametrize(
    ("size", "window", "shift"), [((6, 8), (3, 4), (0, 0)), ((6, 8), (3, 4), (1, 2)), ((8, 8), (4, 4), (2, 2))]
)
def test_windows_are_swins(size, window, shift):
    rolled = torch.roll(picture(*size), (-shift[0], -shift[1]), (1, 2))
    grid = window_grid(*size, window, shift)
    assert torch.equal(grid.index, partitioned(rolled, window))
    if shift != (0, 0):
        assert not torch.equal(window_grid(*size, window).index, grid.index)


def test_windows_that_do_not_fit_are_filled_up_on_the_right_and_below():
    padded = torch.nn.functional.pad(picture(5, 7), (0, 0, 0, 1, 0, 1))
    grid = window_grid(5, 7, (3, 4))
    assert torch.equal(grid.index, partitioned(padded, (3, 4)))
    assert (grid.index == PADDING).sum() == 6 * 8 - 5 * 7


def test_grids_are_maxvits():
    x = picture(6, 8)
    expected = maxxvit.grid_partition(x, [3, 2]).flatten(1).long() - 1
    assert torch.equal(strided_grid(6, 8, (3, 2)).index, expected)
    assert not torch.equal(window_grid(6, 8, (3, 2)).index, expected)


@pytest.mark.parametrize(
    "grid",
    [whole_grid(2, 3, 2), window_grid(4, 4, (2, 2), (1, 1)), window_grid(5, 3, (2, 2)), strided_grid(4, 6, (2, 3))],
)
def test_scatter_undoes_gather_and_drops_padding(grid):
    values = torch.randn(2, 3, grid.num_tokens, dtype=torch.float64)
    parts = grid.gather(values)
    assert parts.shape == (2, 3, *grid.index.shape)
    assert (parts[..., grid.index == PADDING] == 0).all()
    assert torch.equal(grid.scatter(parts), values)


def test_patches_leave_prefix_tokens_out():
    grid = whole_grid(2, 3, 2)
    assert torch.equal(grid.patches(torch.arange(8)), torch.tensor([[2, 3, 4], [5, 6, 7]]))
    assert grid.is_whole
    assert not window_grid(2, 2, (1, 2)).is_whole
