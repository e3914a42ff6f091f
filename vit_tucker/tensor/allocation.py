"""Ranks for many tensors at once: the least error within a cost, or the least cost within an error.

With the orthonormal bases of a HOSVD, the squared error of every rank triple is known at once: it is the squared norm of the
core outside the leading (r1, r2, r3) corner. These tables are searched by a Lagrange multiplier: each tensor by itself takes
the triple of least error + weight * cost, and the weight is the one whose triples just fit; what is left is spent step by step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vit_tucker.tensor.tucker import Pairs, Ranks, gram_right, hosvd

MAX_STEPS = 128
"""Rank values per mode in a table: wider modes go in coarser steps."""


@dataclass(frozen=True)
class RankTable:
    """Squared error and cost of each rank triple of one tensor.

    Attributes:
        ranks: the rank values of the three modes, rising, int64: (n1,), (n2,), (n3,).
        error: squared error, (n1, n2, n3), float64; 0 in the last entry.
        cost: (n1, n2, n3), float64.
        norm: squared norm of the tensor, in the unit of the error.
    """

    ranks: tuple[Tensor, Tensor, Tensor]
    error: Tensor
    cost: Tensor
    norm: float

    def at_third(self, index: int) -> "RankTable":
        """Returns the entries with one third rank.

        Args:
            index: of the rank among ``ranks[2]``.
        """
        r1, r2, r3 = self.ranks
        part = slice(index, index + 1)
        return RankTable((r1, r2, r3[part]), self.error[..., part], self.cost[..., part], self.norm)

    def triple(self, index: int) -> Ranks:
        """Returns the ranks of an entry, by its index in the flattened tables.

        Args:
            index: of the entry in the flattened tables, from 0.
        """
        at = torch.unravel_index(torch.tensor(index), self.error.shape)
        r1, r2, r3 = (int(values[i]) for values, i in zip(self.ranks, at, strict=True))
        return r1, r2, r3


def rank_steps(full: int, multiple: int) -> Tensor:
    """Returns the ranks that are tried along a mode: multiples below the full rank, at most MAX_STEPS, and the full rank.

    Args:
        full: the largest rank of the mode.
        multiple: the smallest step between two ranks.
    """
    step = multiple * -(-full // (MAX_STEPS * multiple))
    return torch.tensor([*range(step, full, step), full])


def rank_table(
    pairs: Pairs, full: Ranks, cost: Callable[[Any, Any, Any], Any], multiple: int = 1, rotary: bool = False
) -> RankTable:
    """Returns the error and cost of the truncated HOSVDs of a tensor.

    Args:
        pairs: the tensor (H, I, J), float64.
        full: ranks at which its HOSVD is exact.
        cost: of ranks (r1, r2, r3), in arithmetic that broadcasts.
        multiple: step of the second and third mode; the head mode goes in steps of one.
        rotary: the tensor is a lifted one (``tensor.rotary``): its third mode is cut as it is, by pairs.

    Source: De Lathauwer et al., A multilinear singular value decomposition, 2000 (property 10: what truncation costs).
    """
    right = None
    if rotary:  # folded tensors have fewer columns than the full rank, those of grouped heads more, which are zero
        missing = max(0, full[2] - pairs.right.shape[1])
        pairs = Pairs(pairs.left, torch.nn.functional.pad(pairs.right, (0, 0, 0, missing)))
        right = torch.eye(pairs.right.shape[1], full[2], dtype=pairs.right.dtype, device=pairs.right.device)
    squares = hosvd(pairs, full, right=right).core.square().cpu()
    kept = squares.cumsum(0).cumsum(1).cumsum(2)
    third = math.lcm(multiple, 2) if rotary else multiple
    r1, r2, r3 = ranks = rank_steps(full[0], 1), rank_steps(full[1], multiple), rank_steps(full[2], third)
    kept = kept[r1 - 1][:, r2 - 1][:, :, r3 - 1]
    norm = kept[-1, -1, -1].item()
    costs = cost(r1[:, None, None], r2[None, :, None], r3[None, None, :]).double()
    return RankTable(ranks, (norm - kept).clamp_min(0), costs, norm)


def third_mode_table(
    pairs: Pairs, full: Ranks, cost: Callable[[Any, Any, Any], Any], multiple: int = 1, rotary: bool = False
) -> RankTable:
    """Returns the entries of ``rank_table`` whose first and second ranks are full, without forming a core.

    Args:
        pairs, full, cost, multiple, rotary: as of ``rank_table``.
    """
    squares = column_energies(pairs) if rotary else torch.linalg.eigvalsh(gram_right(pairs)).flip(0).clamp_min(0)
    kept = (
        torch.nn.functional.pad(squares, (0, full[2]))[: full[2]].cumsum(0).cpu()
    )  # folded tensors have fewer columns
    r3 = rank_steps(full[2], math.lcm(multiple, 2) if rotary else multiple)
    r1, r2 = (torch.tensor([rank]) for rank in full[:2])
    costs = cost(r1[:, None, None], r2[None, :, None], r3[None, None, :]).double()
    norm = kept[-1].item()
    return RankTable((r1, r2, r3), (norm - kept[r3 - 1]).clamp_min(0).expand(1, 1, -1), costs, norm)


def column_energies(pairs: Pairs) -> Tensor:
    """Returns the squared norm of the tensor at each coordinate of its right mode, (J,).

    Args:
        pairs: the tensor (H, I, J).
    """
    return (pairs.right @ (pairs.left.mT @ pairs.left) * pairs.right).sum((0, 2))


def least_error(tables: Sequence[RankTable], budget: float) -> list[Ranks]:
    """Returns the triples of least summed error whose summed cost is within the budget.

    Args:
        tables: errors and costs of the ranks of each tensor.
        budget: the most that all tensors together may cost, in the unit of ``RankTable.cost``.

    Raises:
        ValueError: even the smallest ranks cost more; says how much.
    """
    smallest = sum(t.cost.min().item() for t in tables)
    if smallest > budget:
        raise ValueError(f"the smallest ranks cost {smallest:.0f}, more than {budget:.0f}")
    chosen = minimise([t.error for t in tables], [t.cost for t in tables], budget)
    return [t.triple(i) for t, i in zip(tables, chosen, strict=True)]


def least_cost(tables: Sequence[RankTable], energy: float) -> list[Ranks]:
    """Returns the triples of least summed cost that keep a share of the summed squared norms.

    Args:
        tables: of the tensors.
        energy: 0 < energy <= 1; at 1 all but rounding (1e-12) is kept.
    """
    limit = (1 - energy + 1e-12) * sum(t.norm for t in tables)
    chosen = minimise([t.cost for t in tables], [t.error for t in tables], limit)
    return [t.triple(i) for t, i in zip(tables, chosen, strict=True)]


def minimise(objective: Sequence[Tensor], constraint: Sequence[Tensor], limit: float) -> list[int]:
    """Returns an entry of each flattened table: the summed objective is low, the summed constraint within the limit.

    Args:
        objective, constraint: one pair of tables (any shape, the same in both) per tensor.
        limit: at least the sum of the constraints' least entries.
    """
    goals, uses = [t.flatten() for t in objective], [t.flatten() for t in constraint]

    def pick(weight: float) -> list[int]:
        return [int((goal + weight * use).argmin()) for goal, use in zip(goals, uses, strict=True)]

    def fits(chosen: list[int]) -> bool:
        return sum(use[i].item() for use, i in zip(uses, chosen, strict=True)) <= limit

    best = [int(use.argmin()) for use in uses]
    spread = sum((use.max() - use.min()).item() for use in uses)
    low = high = sum((goal.max() - goal.min()).item() for goal in goals) / spread if spread > 0 else 1.0
    for _ in range(60):  # a weight that fits, and one that doesn't
        if fits(pick(high)):
            break
        high *= 4
    for _ in range(60):
        if not fits(pick(low)):
            break
        low /= 4
    for _ in range(60):
        middle = (low * high) ** 0.5
        chosen = pick(middle)
        if fits(chosen):
            high, best = middle, chosen
        else:
            low = middle
    return spend(goals, uses, best, limit)


def spend(goals: list[Tensor], uses: list[Tensor], chosen: list[int], limit: float) -> list[int]:
    """Spends what is left below the limit: again and again the change with the largest gain per use that still fits.

    Args:
        goals, uses: one pair of tables (any shape, the same in both) per tensor: what is minimised, and what is limited.
        chosen: the chosen entry of each flattened table; not changed.
        limit: the most that the chosen entries may use together.

    Returns:
        The chosen entries, improved until no change that fits gains anything.
    """
    left = limit - sum(use[i].item() for use, i in zip(uses, chosen, strict=True))
    while True:
        best, which, entry = 0.0, -1, -1
        for number, (goal, use, at) in enumerate(zip(goals, uses, chosen, strict=True)):
            gain, extra = goal[at] - goal, use - use[at]
            rate = torch.where((gain > 0) & (extra <= left), gain / extra.clamp_min(1e-300), 0.0)
            top = int(rate.argmax())
            if rate[top] > best:
                best, which, entry = rate[top].item(), number, top
        if which < 0:
            return chosen
        left -= (uses[which][entry] - uses[which][chosen[which]]).item()
        chosen = [*chosen[:which], entry, *chosen[which + 1 :]]
