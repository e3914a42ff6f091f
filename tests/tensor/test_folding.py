"""Folding of rotations: exact where nothing is folded or nothing differs, better than exact rotations in a narrow latent."""

import pytest
import torch

from vit_tucker.tensor.folding import Division, Folds, best_fold, divide, fold
from vit_tucker.tensor.rotary import RotaryPairs, lift, pair_energies

H, IN, J, F, N = 3, 10, 12, 4, 16


def tensor(seed=0):
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(H, size, 2 * F, generator=g, dtype=torch.float64) for size in (IN, J))
    return RotaryPairs(left, right, torch.arange(F).expand(H, -1))


def folds_of(speeds, causal=True):
    """What folding costs over all positions of a query and an earlier key, for rotations by ``speeds`` at each step."""
    query, key = torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij")
    pairs = (key <= query) if causal else torch.ones(N, N, dtype=torch.bool)
    turns = torch.exp(1j * torch.cat([speeds, torch.zeros(1, dtype=torch.float64)])[:, None] * (key - query)[pairs])
    means = ((turns @ turns.conj().T) / pairs.sum())[:-1]
    return Folds(means, (1 - means.abs().square()).clamp(0, 1))


def scores(left, right, rotations, speeds, x, y, distance):
    """sum_k Re(conj(x a_k) (y b_k) exp(i distance speed_k)) of each head."""
    q, k = (
        torch.view_as_complex((z @ side).unflatten(-1, (-1, 2)).contiguous()) for z, side in ((x, left), (y, right))
    )
    return (q.conj() * k * torch.exp(1j * distance * speeds[rotations])).real.sum(-1)


def latent_scores(lifted, width, speeds, x, y, distance):
    q = torch.einsum("hk,hsk->hs", x @ lifted.pairs.left, lifted.pairs.right[:, :width])
    key = (y @ lifted.basis[:, :width]).expand(H, -1)
    q, key = (torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous()) for z in (q, key))
    return (q.conj() * key * torch.exp(1j * distance * speeds[lifted.rotations[: width // 2]])).real.sum(-1)


def error(lifted, width, given, speeds, draws=200):
    """Mean squared error of the scores of random tokens at the distances of a causal sequence, over their mean square."""
    g = torch.Generator().manual_seed(1)
    wrong = whole = 0.0
    for _ in range(draws):
        x, y = (torch.randn(size, generator=g, dtype=torch.float64) for size in (IN, J))
        query = int(torch.randint(N, (), generator=g))
        distance = int(torch.randint(query + 1, (), generator=g)) - query
        true = scores(given.left, given.right, given.rotations, speeds, x, y, distance)
        wrong += (latent_scores(lifted, width, speeds, x, y, distance) - true).square().sum().item()
        whole += true.square().sum().item()
    return wrong / whole


def speeds(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_nothing_folded_is_the_lifted_tensor():
    given, expected = tensor(), lift(tensor())
    none = divide(folds_of(speeds(1.0, 0.5, 0.1, 0.01)), torch.ones(F), 0.0, False)
    assert none.chosen.tolist() == [0, 1, 2, 3]
    found = fold(given, none, 3)
    for one, other in ((found.basis, expected.basis), (found.pairs.right, expected.pairs.right)):
        torch.testing.assert_close(one, other)
    wide = best_fold(given, folds_of(speeds(1.0, 0.5, 0.1, 0.01)), 2 * F * H)
    assert error(wide, wide.basis.shape[1], given, speeds(1.0, 0.5, 0.1, 0.01)) < 1e-20


@pytest.mark.parametrize("slow", [0.0, 0.7], ids=["still", "turning"])
def test_rotations_that_are_the_same_fold_without_loss(slow):
    given, turns = tensor(), speeds(1.0, slow, slow, slow)
    division = divide(folds_of(turns), torch.ones(F), 1e-9, True)
    assert len(set(division.chosen.tolist())) == 2
    assert (division.chosen == F).sum() == (3 if slow == 0 else 0)
    assert division.lost.abs().max() < 1e-12
    found = fold(given, division, 3)
    assert error(found, found.basis.shape[1], given, turns) < 1e-20
    width = 12
    assert error(best_fold(given, folds_of(turns), width), width, given, turns) < 0.8 * error(
        lift(given), width, given, turns
    )


def test_the_factor_is_the_best_for_a_pair_under_another_rotation():
    """Scores of a pair under a neighbour's rotation: the mean's factor loses what is said, any other loses more."""
    left, right, turns = *tensor()[:2], speeds(0.30, 0.36)
    given = RotaryPairs(
        left[..., :4], right[..., :4] * torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.arange(2).expand(H, -1)
    )
    best = folds_of(turns).factors[0, 1]
    errors = []
    for factor in (best, best.conj(), torch.ones((), dtype=torch.complex128), best * 0.7):
        division = Division(torch.tensor([1, 1]), torch.stack([factor, torch.ones_like(factor)]), torch.zeros(2))
        lifted = fold(given, division, 1)
        errors.append(error(lifted, lifted.basis.shape[1], given, turns, draws=3000))
    assert errors[0] == min(errors)
    assert errors[0] == pytest.approx(folds_of(turns).lost[0, 1].item(), rel=0.15)
    assert errors[1] > 1.5 * errors[0]


@pytest.mark.parametrize("width", [4, 8, 12])
def test_what_is_chosen_loses_least(width):
    given, turns = tensor(), speeds(1.0, 0.05, 0.04, 0.01)
    means = folds_of(turns)
    found = best_fold(given, means, width)
    assert error(found, width, given, turns) <= error(lift(given), width, given, turns) * 1.02
    assert pair_energies(found).diff().max() <= 1e-9


def test_fast_rotations_are_not_folded():
    given, turns = tensor(), speeds(2.9, 2.1, 1.3, 0.8)
    found = best_fold(given, folds_of(turns, causal=False), 8)
    torch.testing.assert_close(found.basis, lift(given).basis)
