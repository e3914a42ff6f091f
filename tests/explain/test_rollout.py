"""Rollout by hand, through windows and merged patches as matrices of the whole image, and what is refused."""

import pytest
import torch

from vit_tucker.errors import ExplainError
from vit_tucker.explain.grid import whole_grid, window_grid
from vit_tucker.explain.rollout import attention_rollout, discard, fuse_heads, roll_back, spread_rows, with_residual

A1 = torch.tensor([[[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 1]], [[0, 1.0, 0], [0.5, 0, 0.5], [1, 0, 0]]]).double()[None]
A2 = torch.tensor([[[0, 0, 1.0], [0, 1, 0], [0.5, 0.5, 0]], [[0, 0, 1.0], [0, 1, 0], [0.5, 0.5, 0]]]).double()[None]


def softmaxed(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)


def test_two_layers_by_hand():
    # heads' mean of A1: [[.5, .5, 0], [.5, .25, .25], [.5, 0, .5]], with I: [[.75, .25, 0], [.25, .625, .125], [.25, 0, .75]]
    # A2 with I: [[.5, 0, .5], [0, 1, 0], [.25, .25, .5]]; the first row of A2 A1: .5 (.75, .25, 0) + .5 (.25, 0, .75)
    rollout = attention_rollout({"a": A1, "b": A2})
    expected = [[0.5, 0.125, 0.375], [0.25, 0.625, 0.125], [0.375, 0.21875, 0.40625]]
    torch.testing.assert_close(rollout, torch.tensor(expected).double()[None], rtol=0, atol=1e-15)
    reversed_order = attention_rollout([A2, A1])
    assert (reversed_order - rollout).abs().max() > 0.05


@pytest.mark.parametrize(("fusion", "first_row"), [("mean", [0.5, 0.5, 0]), ("max", [1, 1, 0]), ("min", [0, 0, 0])])
def test_fusion_of_heads(fusion, first_row):
    assert fuse_heads(A1, fusion)[0, 0].tolist() == first_row
    rows = attention_rollout([A1, A2], head_fusion=fusion).sum(-1)
    torch.testing.assert_close(rows, torch.ones(1, 3).double())  # normalised again


def test_rows_to_start_from():
    start = torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5]]).double()
    torch.testing.assert_close(attention_rollout([A1, A2], start=start), start @ attention_rollout([A1, A2]))


def test_discarding_the_smallest_entries():
    fused = torch.tensor([[0.1, 0.9], [0.3, 0.7]])[None, None]
    assert discard(fused, 0.5)[0, 0].flatten().tolist() == pytest.approx([0, 0.9, 0, 0.7])
    assert discard(fused, 0.5, keep_first=True)[0, 0].flatten().tolist() == pytest.approx([0.1, 0.9, 0, 0.7])
    assert torch.equal(discard(fused, 0.0), fused)
    changed = attention_rollout([softmaxed(1, 2, 5, 5)], discard_ratio=0.4) - attention_rollout([softmaxed(1, 2, 5, 5)])
    assert changed.abs().max() > 0.01


def whole_map(fused, grid):
    """Windows as one matrix of all tokens of the image, (T, T)."""
    full = torch.zeros(grid.num_tokens + 1, grid.num_tokens + 1, dtype=fused.dtype)
    for index, window in zip(grid.index, fused, strict=True):
        index = torch.where(index < 0, grid.num_tokens, index)  # padding: a row and column of its own
        full[index[:, None], index[None]] = window
    return full[:-1, :-1]


@pytest.mark.parametrize("grid", [window_grid(4, 6, (2, 3), (1, 1)), window_grid(3, 5, (2, 2)), whole_grid(2, 2, 1)])
def test_windows_are_blocks_of_the_map_of_the_whole_image(grid):
    sequences, tokens = grid.index.shape
    fused = softmaxed(sequences, tokens, tokens)
    rows = softmaxed(1, 2, grid.num_tokens)
    expected = rows @ whole_map(with_residual(fused), grid)
    torch.testing.assert_close(roll_back(rows, fused, grid), expected, rtol=0, atol=1e-14)  # sums of 25 terms below 1
    other = whole_grid(grid.height, grid.width, grid.num_prefix)
    if sequences > 1:
        assert (other.index.numel() != grid.index.numel()) or not torch.equal(
            other.index.flatten(), grid.index.flatten()
        )


def test_merged_patches_share_alike():
    rows = torch.tensor([[[0.4, 0.6]]]).double()
    fine = spread_rows(
        rows, whole_grid(1, 2), whole_grid(2, 3)
    )  # the second patch has merged a column of two and padding
    assert fine[0, 0].tolist() == pytest.approx([0.1, 0.1, 0.3, 0.1, 0.1, 0.3])
    assert spread_rows(rows, whole_grid(1, 2), whole_grid(1, 2)) is rows
    assert spread_rows(torch.arange(5.0)[None, None], whole_grid(2, 2, 1), whole_grid(2, 2)).flatten().tolist() == [
        1,
        2,
        3,
        4,
    ]
    with pytest.raises(ExplainError, match="2x3 tokens can't be merged into 2x2"):
        spread_rows(torch.ones(1, 1, 4), whole_grid(2, 2), whole_grid(2, 3, 1))


@pytest.mark.parametrize(
    ("maps", "options", "message"),
    [
        ([], {}, "no maps"),
        ([A1, softmaxed(4, 2, 3, 3)], {}, "different tokens"),
        ([A1], {"head_fusion": "maximum"}, "head fusion 'maximum': one of mean, max, min"),
        ([A1], {"discard_ratio": 1.0}, "discard ratio 1: must be at least 0 and below 1"),
    ],
)
def test_refused(maps, options, message):
    with pytest.raises(ExplainError, match=message):
        attention_rollout(maps, **options)
