"""Tensors with rotations: lifted ones score alike, and their norm is the mean over all angles."""

import pytest
import torch

from vit_tucker.tensor.allocation import rank_table
from vit_tucker.tensor.joint_latent import leave_room
from vit_tucker.tensor.metric import metric_root
from vit_tucker.tensor.rotary import (
    RotaryPairs,
    as_complex,
    as_real,
    lift,
    pair_energies,
    rotary_distance,
    rotary_tucker,
    whiten_rotary,
)
from vit_tucker.tensor.tucker import squared_norm, tucker_pairs

H, ROWS, COLUMNS, K = 3, 11, 10, 6
SHARED = torch.arange(K // 2).expand(H, -1)
OWN = torch.arange(H * K // 2).unflatten(0, (H, -1))
UNEVEN = torch.tensor([[0, 0, 1], [0, 1, 2], [0, 0, 0]])
KINDS = pytest.mark.parametrize("columns", [SHARED, OWN, UNEVEN], ids=["shared", "own", "uneven"])


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_tensor(columns, seed=0):
    return RotaryPairs(rand(H, ROWS, K, seed=seed), rand(H, COLUMNS, K, seed=seed + 1), columns)


def scores(tensor, x, y, angles):
    """Of one token pair, by the formula. (H,)"""
    turned = as_real(as_complex(y @ tensor.right) * torch.exp(1j * angles[tensor.rotations]))
    return ((x @ tensor.left) * turned).sum(-1)


def latent_scores(lifted, x, y, angles):
    return scores(
        RotaryPairs(lifted.pairs.left @ lifted.pairs.right.mT, lifted.basis.expand(H, -1, -1), lifted.rotations.expand(H, -1)),
        x, y, angles,
    )  # fmt: skip


@KINDS
def test_lifted_tensors_score_alike_at_all_angles(columns):
    tensor = random_tensor(columns)
    lifted, x, y = lift(tensor), rand(ROWS, seed=5), rand(COLUMNS, seed=6)
    for seed in range(3):
        angles = rand(H * K, seed=seed) * 3
        expected = scores(tensor, x, y, angles)
        torch.testing.assert_close(latent_scores(lifted, x, y, angles), expected, rtol=1e-11, atol=1e-11)
        shuffled = lifted._replace(rotations=lifted.rotations.roll(1))
        assert not torch.allclose(latent_scores(shuffled, x, y, angles), expected, rtol=1e-3)


@KINDS
def test_norm_is_the_mean_over_all_angles(columns):
    """A trigonometric polynomial of degree 2 in each angle: its mean is that over a grid of 3 angles each."""
    tensor = random_tensor(columns)
    rotations = columns.unique().numel()
    if rotations > 3:
        tensor = RotaryPairs(tensor.left[:1], tensor.right[:1], columns[:1])
        rotations = 3
    thirds = torch.cartesian_prod(*[torch.arange(3).double() * 2 * torch.pi / 3] * rotations)
    total = 0.0
    for angles in thirds:
        turned = as_real(as_complex(tensor.right) * torch.exp(1j * angles[tensor.rotations]).unsqueeze(1))
        total += (tensor.left @ turned.mT).square().sum().item() / len(thirds)
    assert total == pytest.approx(squared_norm(lift(tensor).pairs).item() / 2, rel=1e-10)


@pytest.mark.parametrize("columns", [SHARED, OWN], ids=["shared", "own"])
def test_cuts_lose_what_their_pairs_hold(columns):
    tensor = random_tensor(columns)
    lifted = lift(tensor)
    energy = pair_energies(lifted)
    norm = squared_norm(lifted.pairs)
    assert (energy[:-1] >= energy[1:] - 1e-9).all()
    assert energy.sum() == pytest.approx(norm.item(), rel=1e-12)
    for rank in range(2, H * K, 4):
        cut = rotary_tucker(lifted, (H, ROWS, rank))
        form = RotaryPairs(
            cut.left @ torch.tensordot(cut.head, cut.core, 1),
            cut.right.expand(H, -1, -1),
            lifted.rotations[: rank // 2].expand(H, -1),
        )
        lost = rotary_distance(tensor, form).square() * norm
        torch.testing.assert_close(lost, energy[rank // 2 :].sum(), rtol=1e-9, atol=1e-9)
    assert rotary_distance(tensor, random_tensor(columns, seed=9)) > 1
    assert rotary_distance(tensor, tensor) < 1e-14


def test_rank_tables_of_lifted_tensors_are_exact():
    lifted = lift(random_tensor(SHARED))
    table = rank_table(lifted.pairs, (H, ROWS, H * K), lambda r1, r2, r3: r1 + r2 + r3, multiple=3, rotary=True)
    assert table.ranks[2].tolist() == [6, 12, 18]
    for index in (0, 7, 20, table.error.numel() - 1):
        ranks = table.triple(index)
        cut = rotary_tucker(lifted, ranks)._replace(right=torch.eye(H * K, ranks[2], dtype=torch.float64))
        error = (lifted.pairs.dense() - tucker_pairs(cut).dense()).square().sum()
        torch.testing.assert_close(table.error.flatten()[index], error, rtol=1e-9, atol=1e-9)


def test_whitening_moves_the_cut_to_what_counts():
    tensor = random_tensor(SHARED)
    metric = torch.diag(torch.tensor([100.0] * 2 + [0.01] * 8).double())
    root = metric_root(metric)

    def loss(basis, columns):  # of the keys on tokens with this metric, all queries alike
        total = 0.0
        for rotation in range(K // 2):
            span = torch.linalg.qr(root.root.to(torch.complex128) @ as_complex(basis)[:, columns == rotation]).Q
            keys = root.root.to(torch.complex128) @ as_complex(tensor.right)[:, :, rotation].mT
            total += (keys - span @ (span.mH @ keys)).abs().square().sum().item()
        return total

    plain, whitened = lift(tensor), lift(whiten_rotary(tensor, right=root.root))
    basis = root.inverse @ whitened.basis
    assert loss(basis[:, :6], whitened.rotations[:3]) < 0.7 * loss(plain.basis[:, :6], plain.rotations[:3])


@pytest.mark.parametrize("weighted", [False, True])
def test_a_latent_for_keys_and_values(weighted):
    lifted, values = lift(random_tensor(OWN)), rand(COLUMNS - 1, 4, seed=4)
    metric = metric_root(torch.diag(torch.linspace(0.1, 2, COLUMNS - 1).double())) if weighted else None
    shared = leave_room(lifted, values, 6, torch.zeros(3, dtype=torch.int64), metric)
    keys = int((shared.pairs.right.abs().sum((0, 2)) > 0).sum())
    assert 2 <= keys < 6
    assert shared.basis.shape == (COLUMNS, 6)
    assert shared.rotations.shape == (3,)
    torch.testing.assert_close(shared.basis[:, :keys], lifted.basis[:, :keys])
    root = metric.root if metric else torch.eye(COLUMNS - 1, dtype=torch.float64)

    def lost(basis):
        span = torch.linalg.qr(root @ basis[:-1]).Q
        return (root @ values - span @ (span.mT @ (root @ values))).norm()

    assert lost(shared.basis) < 0.7 * lost(lifted.basis[:, :6])
