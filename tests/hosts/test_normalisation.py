"""Normalisation for other channels."""

import pytest

from vit_tucker.hosts.normalisation import fit_channels


def test_values_are_kept_or_their_mean_is_taken():
    assert fit_channels([0.2, 0.4, 0.9], 3) == (0.2, 0.4, 0.9)
    assert fit_channels((0.2, 0.4, 0.9), 1) == pytest.approx((0.5,))
    assert fit_channels((0.5,), 3) == (0.5, 0.5, 0.5)
