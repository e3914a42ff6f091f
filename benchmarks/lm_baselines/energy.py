"""Energy of the keys in a basis per RoPE frequency: complex, as in ``vit_tucker.tensor.rotary``, against RoRoPE's real one."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lm_baselines.care import root_and_inverse
from lm_baselines.moments import LayerMoments, shape_of
from lm_baselines.rorope import rotations
from vit_tucker.tensor.rotary import RotaryPairs, lift


class Energies(NamedTuple):
    """Shares of the keys' energy in the leading components, (components,), which rise to 1.

    Attributes:
        complex: of the complex basis that ``lift`` gives.
        real: of a real basis.
    """

    complex: Tensor
    real: Tensor


def key_energies(attention: Any, moment: LayerMoments, real_basis: Tensor | None = None) -> Energies:
    """Returns what both bases hold of one layer's keys on the calibration tokens, by the number of kept components.

    A component is a pair that rotates at one frequency. Both bases are sorted by energy over all frequencies.

    Args:
        attention: dense module of G key heads.
        moment: of its input.
        real_basis: a rotation of the G heads for each frequency, (D/2, G, G), components last; None for RoRoPE's, the best one.
    """
    _, groups, width = shape_of(attention)
    key = attention.k_proj.weight.detach().double()
    root, _ = root_and_inverse(moment.inputs, 0.0)
    halves = (key @ root).view(groups, 2, width // 2, -1)  # (G, parts, D/2, C)
    right = halves.permute(0, 3, 2, 1).flatten(2)  # (G, C, D), pairs side by side
    left = right.new_full((groups, 1, width), 0.5**0.5)  # each pair counts alike
    numbers = torch.arange(width // 2).expand(groups, -1)
    coefficients = lift(RotaryPairs(left, right, numbers)).pairs.right  # (G, S, D), blocks of two by two
    complex_energy = coefficients.square().sum((0, 2)).unflatten(0, (-1, 2)).sum(1) / 2
    basis = rotations(key, moment.inputs, width, 1) if real_basis is None else real_basis
    turned = torch.einsum("fgc,gpfx->fcpx", basis, halves)
    real_energy = turned.square().sum((2, 3)).flatten()
    shares = [
        energy.sort(descending=True).values.cumsum(0) / halves.square().sum()
        for energy in (complex_energy, real_energy)
    ]
    return Energies(*shares)
