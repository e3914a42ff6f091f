"""Spectra of the modes against the formed unfoldings, and the definitions of rank on spectra known by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_tucker.tensor.mode_ranks import (
    effective_rank,
    energy_rank,
    mode_ranks,
    mode_spectra,
    numerical_rank,
    stable_rank,
)
from vit_tucker.tensor.tucker import Pairs


def random_pairs(heads, rows, columns, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(heads, rows, width, generator=generator, dtype=torch.float64)
    return Pairs(left, torch.randn(heads, columns, width, generator=generator, dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(0, 99))
def test_spectra_are_those_of_the_unfoldings(heads, rows, columns, width, seed):
    pairs = random_pairs(heads, rows, columns, width, seed)
    for mode, values in enumerate(mode_spectra(pairs)):
        expected = torch.linalg.svdvals(pairs.dense().movedim(mode, 0).flatten(1))
        shared = min(len(values), len(expected))
        torch.testing.assert_close(values[:shared], expected[:shared], rtol=1e-12, atol=1e-12)
        assert (expected[shared:] < 1e-12).all()
        assert (values[shared:] < 1e-12).all()


def test_small_singular_values_survive():
    """The Gram route would lose everything below 1e-8 of the largest."""
    scales = torch.tensor([1.0, 1e-5, 1e-11], dtype=torch.float64)
    basis = torch.linalg.qr(random_pairs(1, 8, 8, 3).left[0]).Q
    pairs = Pairs((basis * scales).unsqueeze(0), torch.eye(8, dtype=torch.float64)[:, :3].unsqueeze(0))
    torch.testing.assert_close(mode_spectra(pairs).left[:3], scales, rtol=1e-4, atol=0)
    assert mode_ranks(pairs) == (1, 3, 3)


def test_definitions_on_known_spectra():
    flat = torch.ones(8, dtype=torch.float64)
    assert effective_rank(flat) == pytest.approx(8)
    assert stable_rank(flat) == pytest.approx(8)
    two = torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert effective_rank(two) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert stable_rank(two) == pytest.approx(10 / 9)
    squares = torch.tensor([50.0, 40.0, 9.0, 1.0], dtype=torch.float64).sqrt()
    assert [energy_rank(squares, e) for e in (0.49, 0.89, 0.95, 0.985, 0.995, 1.0)] == [1, 2, 3, 3, 4, 4]
    assert numerical_rank(torch.tensor([1.0, 1e-3, 1e-20], dtype=torch.float64), 10) == 2
    assert numerical_rank(two, 10, tolerance=0.5) == 1
