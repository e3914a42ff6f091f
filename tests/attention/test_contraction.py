"""Products in the order that costs least: the same results either way, and the choice by what it costs."""

import pytest
import torch
from torch import nn

from vit_tucker.attention import contraction
from vit_tucker.attention.contraction import chain_macs, folds, is_plain, joins, joint_linear


@pytest.mark.parametrize(
    "biases", [(True, False, False), (False, False, False), (True, True, False), (False, False, True)]
)
def test_joint_projections_are_the_projections(biases, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    linears = [nn.Linear(12, n, bias=b, dtype=torch.float64) for n, b in zip((2, 3, 5), biases, strict=True)]
    expected = [linear(x) for linear in linears]
    for joined in (True, False):
        monkeypatch.setattr(contraction, "joins", lambda *_, joined=joined: joined)
        for a, b in zip(joint_linear(x, linears), expected, strict=True):
            torch.testing.assert_close(a, b)
            assert not torch.allclose(a, b + 1e-3)


def test_when_projections_are_joined():
    """In training, or where x (here 800 bytes a token) is more than a cache holds; never one alone, or wider than x."""
    small, large = torch.empty(2, 4, 200), torch.empty(2, 2000, 200)
    assert joins(small, [8, 8])
    assert not joins(small, [8])
    assert not joins(small, [150, 51])
    with torch.no_grad():
        assert not joins(small, [8, 8])
        assert joins(large, [8, 8])


def test_a_chain_costs_the_better_order():
    """x (10, 6), A (6, 2), B (2, 5): 10*2*11 apart, 6*5*(10+2) folded; and with many columns inside, folded."""
    assert chain_macs(10, 6, 2, 5) == 220
    assert chain_macs(10, 6, 20, 5) == 30 * 30
    x = torch.empty(2, 5, 6)
    assert not folds(x, 6, 2, 5)
    assert folds(x, 6, 20, 5)
    assert not folds(x[:, :1], 6, 4, 5)  # two tokens: 2*4*11 apart, 30*6 folded


def test_linears_with_hooks_or_adapters_run_as_modules():
    linear = nn.Linear(3, 2)
    assert is_plain(linear)
    handle = linear.register_forward_hook(lambda *_: None)
    assert not is_plain(linear)
    handle.remove()
    assert is_plain(linear)
    nn.utils.parametrizations.orthogonal(linear)
    assert not is_plain(linear)
