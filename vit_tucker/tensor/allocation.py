"""Ranks under a budget, over many tensors at once: each unit of cost goes where it lowers the error most.

The squared error of a truncated HOSVD is at most the sum, over the modes, of the discarded squared singular values. That bound is
a sum of falling terms, one per mode of each tensor, so it can be lowered greedily: again and again the step with the largest gain
per cost. The cost of a step depends on the other two ranks of its tensor (the core is their product) and is counted exactly.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vit_tucker.tensor.ranks import energy_rank

Ranks = tuple[int, int, int]


@dataclass(frozen=True)
class TensorModes:
    """What the allocation knows of one tensor.

    Attributes:
        energies: squared singular values of the three modes, falling, in the same unit for all tensors.
        full: largest ranks that make sense, at most the lengths of the energies.
        cost: of a rank triple; grows with each rank.
    """

    energies: tuple[Tensor, Tensor, Tensor]
    full: Ranks
    cost: Callable[[Ranks], int]

    def error(self, ranks: Ranks) -> float:
        """Bound on the squared error: discarded energy, summed over the modes."""
        return sum(e[r:].sum().item() for e, r in zip(self.energies, ranks, strict=True))


def round_up(rank: int, multiple: int, full: int) -> int:
    """The next multiple, at most ``full``."""
    return min(full, -(-rank // multiple) * multiple)


def energy_ranks(tensor: TensorModes, energy: float, multiple: int = 1) -> Ranks:
    """The smallest ranks that keep a share of each mode's energy, query and key modes rounded up to multiples.

    Args:
        tensor: its energies.
        energy: 0 < energy <= 1.
        multiple: for the second and third mode.
    """
    ranks = []
    for mode, (values, full) in enumerate(zip(tensor.energies, tensor.full, strict=True)):
        rank = energy_rank(values.sqrt(), energy)
        ranks.append(round_up(max(1, rank), 1 if mode == 0 else multiple, full))
    return ranks[0], ranks[1], ranks[2]


def allocate(tensors: Sequence[TensorModes], budget: float, multiple: int = 1) -> list[Ranks]:
    """Ranks of all tensors whose summed cost is within the budget and whose summed error bound is low.

    Args:
        tensors: in any order.
        budget: in the unit of the costs.
        multiple: step of the second and third mode; the head mode goes in steps of one.

    Returns:
        One triple per tensor.

    Raises:
        ValueError: even the smallest ranks cost more; says how much.
    """
    ranks: list[Ranks] = [(1, round_up(1, multiple, t.full[1]), round_up(1, multiple, t.full[2])) for t in tensors]
    spent = sum(t.cost(r) for t, r in zip(tensors, ranks, strict=True))
    if spent > budget:
        raise ValueError(f"the smallest ranks cost {spent}, more than {budget:.0f}")
    sums = [tuple(torch.cat([e.new_zeros(1), e.cumsum(0)]).tolist() for e in t.energies) for t in tensors]
    heap: list[tuple[float, int, int, Ranks]] = []  # (-gain per cost, tensor, mode, ranks it was computed for)

    def push(index: int) -> None:
        for mode in range(3):
            step = next_step(tensors[index], ranks[index], mode, multiple)
            if step is not None:
                kept = sums[index][mode]
                gain = kept[min(step[mode], len(kept) - 1)] - kept[min(ranks[index][mode], len(kept) - 1)]
                cost = tensors[index].cost(step) - tensors[index].cost(ranks[index])
                heapq.heappush(heap, (-gain / cost, index, mode, ranks[index]))

    for index in range(len(tensors)):
        push(index)
    while heap:
        _, index, mode, known = heapq.heappop(heap)
        if known != ranks[index]:  # another mode has moved since, so the cost has changed: pushed anew then
            continue
        step = next_step(tensors[index], ranks[index], mode, multiple)
        assert step is not None
        cost = tensors[index].cost(step) - tensors[index].cost(ranks[index])
        if spent + cost <= budget:
            ranks[index], spent = step, spent + cost
            push(index)
    return ranks


def next_step(tensor: TensorModes, ranks: Ranks, mode: int, multiple: int) -> Ranks | None:
    """The triple with one mode's rank a step higher; None at its full rank."""
    if ranks[mode] >= tensor.full[mode]:
        return None
    raised = round_up(ranks[mode] + 1, 1 if mode == 0 else multiple, tensor.full[mode])
    step = [*ranks[:mode], raised, *ranks[mode + 1 :]]
    return step[0], step[1], step[2]
