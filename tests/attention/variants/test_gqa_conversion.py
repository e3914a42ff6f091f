"""Bases that heads of a group share in GQA."""

import torch

from vit_tucker.attention.variants.gqa import group_bases
from vit_tucker.tensor.tucker import Pairs


def test_the_head_with_the_larger_inputs_counts_more():
    """Two heads of orthogonal columns share a basis that has room for one: it is that of the head whose metric is larger."""
    left = torch.eye(6, 2, dtype=torch.float64).repeat(2, 1, 1)
    columns = torch.eye(8, dtype=torch.float64)
    right = torch.stack([columns[:, :2], columns[:, 2:4]])
    root = torch.eye(6, dtype=torch.float64)
    for large in (0, 1):
        metrics = torch.eye(8, dtype=torch.float64).repeat(2, 1, 1)
        metrics[large] *= 100.0
        bases, changes = group_bases(Pairs(left, right), 1, root, metrics, 0.0)
        assert bases.shape == (1, 8, 2)
        torch.testing.assert_close(right[large] @ right[large].mT @ bases[0], bases[0], rtol=0, atol=1e-9)
        kept = [(bases[0] @ change.mT @ left[i].mT).norm() for i, change in enumerate(changes)]
        assert kept[large] > 0.5
        assert kept[1 - large] < 1e-9
