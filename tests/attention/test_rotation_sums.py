"""What folding of rotations costs, from the sums over calls, against the formula token by token."""

import pytest
import torch

from tests.reference import make_spec, make_weights, rope_of
from vit_tucker.attention.host_maps import host_maps
from vit_tucker.attention.moment_sums import MomentSums
from vit_tucker.attention.moments import MEANS, LayerCall, Needs
from vit_tucker.attention.rope import RopeSpec, adjacent_pairs, head_angles, with_prefix
from vit_tucker.tensor.rotary import as_complex

B, N, C = 2, 7, 24


def rand(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def call_of(spec, **options):
    return LayerCall(rand(B, N, C, seed=1) + 1, rand(B, N, C, seed=2), rand(B, N, C, seed=3), None, True, **options)


@pytest.mark.parametrize("rope", [RopeSpec(1, True), RopeSpec(0, False)], ids=["half, prefix", "neighbours"])
def test_costs_are_those_of_the_pairs_gradients_of_scores(rope):
    spec = make_spec(rope=rope)
    w, call = make_weights(spec), call_of(spec, **rope_of(spec, N))
    sums = MomentSums(spec, w, MEANS)
    sums.add(call)
    found = sums.rotations.folds()
    maps = host_maps(call, w, spec, torch.zeros(C, dtype=torch.float64))
    sin, cos = with_prefix(*head_angles(call.rope, rope), rope.num_prefix_tokens)
    turns = torch.nn.functional.pad(torch.complex(cos, sin), (0, 1), value=1.0)  # (N, D/2 + 1)
    q, k = (as_complex(adjacent_pairs(x, rope.half)) * turns[:, :-1].conj() for x in (maps.q, maps.k))  # unrotated
    for pair in range(3):
        t = []
        for f in range(4):
            angles = turns[:, f] * turns[:, f].conj()[:, None]  # (query, key)
            t.append(q[..., pair].abs() * torch.einsum("bhnl,nl,bhl->bhn", maps.s.to(q.dtype), angles, k[..., pair]))
        for f in range(4):
            product, square = (t[f].conj() * t[pair]).sum(), t[f].abs().square().sum()
            lost = 1 - product.abs().square() / (square * t[pair].abs().square().sum())
            torch.testing.assert_close(found.factors[pair, f], product / square, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.lost[pair, f], lost, rtol=1e-4, atol=1e-5)
    assert found.lost.diagonal().abs().max() < 1e-6
    assert (found.lost[:, -1] > 1e-3).any()  # these rotations are not still


def test_no_costs_without_rotations_of_one_table():
    for spec in (make_spec(), make_spec(rope=RopeSpec(1, False, per_head=True))):
        sums = MomentSums(spec, make_weights(spec), MEANS)
        sums.add(call_of(spec, **rope_of(spec, N)))
        assert sums.rotations is None
    spec = make_spec(rope=RopeSpec())
    assert MomentSums(spec, make_weights(spec), Needs(rotations=False)).rotations is None
