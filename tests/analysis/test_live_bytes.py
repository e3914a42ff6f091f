"""Live bytes by hand."""

import pytest
import torch

from vit_tucker.analysis.live_bytes import LiveBytes

K = 10_000
SLACK = 200
"""Bytes of scalars (losses, their gradients) beside the tensors that are counted by hand."""


def test_live_bytes_by_hand():
    with LiveBytes() as counter:
        a = torch.zeros(K)
        b = a + 1
        del a
        c = b.view(2, -1) + 1  # a view is no new storage
    assert counter.peak() == 2 * 4 * K
    with LiveBytes() as counter:
        a = torch.zeros(K)
        b, c = a + 1, a + 2
    assert counter.peak() == 3 * 4 * K
    counter.leave_out(c)
    assert counter.peak() == 2 * 4 * K
    del b


def test_what_is_kept_does_not_count():
    kept = torch.zeros(K)
    with LiveBytes([kept]) as counter:
        kept.view(2, -1).t() + 1
    assert counter.peak() == 4 * K
    with LiveBytes() as counter:  # twin
        kept.view(2, -1).t() + 1
    assert counter.peak() == 2 * 4 * K


def test_a_backward_pass_by_hand():
    """exp(exp(w)): both results are saved; the first gradient comes while both are there, the second when one is gone."""
    w = torch.zeros(K, requires_grad=True)
    with LiveBytes([w]) as counter:
        w.exp().exp().sum().backward()
    assert 3 * 4 * K <= counter.peak() <= 3 * 4 * K + SLACK


def test_each_allocation_is_extrapolated_by_itself():
    """A fixed buffer is the peak of small batches, one that grows with the batch that of large ones: no line through peaks."""

    def noted(count):
        with LiveBytes() as counter:
            fixed = torch.zeros(K)
            del fixed
            torch.zeros(count, 100)
        return counter

    assert noted(2).peak() == noted(4).peak() == 4 * K
    assert noted(2).extrapolate(noted(4), 499).peak() == noted(1000).peak() == 4 * 1000 * 100
    with LiveBytes() as other:
        torch.zeros(1) + 1
    with pytest.raises(ValueError, match="differently"):
        noted(2).extrapolate(other, 2)
