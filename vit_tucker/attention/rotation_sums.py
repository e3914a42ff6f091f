"""Sums over calls what it costs to rotate a pair of queries and keys by another pair's angles: see ``tensor.folding``."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_tucker.attention.host_maps import Maps
from vit_tucker.attention.rope import RopeSpec, adjacent_pairs, head_angles, with_prefix
from vit_tucker.tensor.folding import Folds
from vit_tucker.tensor.rotary import as_complex

SEQUENCES = 16
"""Sequences that are looked at."""
QUERIES = 64
"""Queries of each, evenly spread: the angles between a query and its keys are all there is to compare."""


class RotationSums:
    """Sums over queries n of conj(t_f) t_k and |t_f|^2, t_f = q(n) sum_l s(n, l) exp(i (angle_f(l) - angle_f(n))) k(l).

    q and k are a pair of some head's query and key before their own rotation k, s the gradient of the head's scores: t_f is what
    the pair does to the probe if it rotates by f.

    Args:
        rope: of the host, one table for all heads.
        pairs: D/2.
        device: of the sums.
    """

    def __init__(self, rope: RopeSpec, pairs: int, device: torch.device) -> None:
        self.rope = rope
        self.products = torch.zeros(pairs, pairs + 1, dtype=torch.complex128, device=device)
        self.squares = torch.zeros(pairs, pairs + 1, dtype=torch.float64, device=device)
        self.sequences = 0

    def add(self, maps: Maps, rope: Tensor) -> None:
        """Adds the first sequences of a call.

        Args:
            maps: of the call.
            rope: (N', 2 D) or (B, 1, N', 2 D) table.
        """
        count = min(len(maps.x), SEQUENCES - self.sequences)
        if count <= 0:
            return
        self.sequences += count
        tokens = maps.x.shape[1]
        rows = torch.linspace(0, tokens - 1, min(tokens, QUERIES), device=rope.device).round().long()
        turns = self._turns(rope, count)  # (B or 1, N, D/2 + 1)
        own = turns[..., :-1].unsqueeze(1)
        queries, keys = (as_complex(adjacent_pairs(x[:count], self.rope.half)) for x in (maps.q, maps.k))
        queries, keys = (
            queries[:, :, rows].abs().square(),
            keys.to(turns.dtype) * own.conj(),
        )  # (B, H, n, D/2), (B, H, N, D/2)
        back = turns[:, rows].conj().unsqueeze(-2)
        for head in range(keys.shape[1]):
            rotated = torch.view_as_real(keys[:, head].unsqueeze(-1) * turns.unsqueeze(-2)).flatten(2)
            sums = (maps.s[:count, head, rows].to(rotated.dtype) @ rotated).unflatten(-1, (*self.products.shape, 2))
            t = torch.view_as_complex(sums) * back  # (B, n, k, f)
            weights = queries[:, head].unsqueeze(-1).to(sums.dtype)
            kept = t.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)  # t_k
            self.products += (weights * t.conj() * kept).sum((0, 1))
            self.squares += (weights * t.abs().square()).sum((0, 1))

    def _turns(self, rope: Tensor, count: int) -> Tensor:
        """Returns exp(i angle) of each rotation, and 1 for no rotation, (B or 1, N, D/2 + 1)."""
        sin, cos = with_prefix(*head_angles(rope, self.rope), self.rope.num_prefix_tokens)
        sin, cos = (part.unsqueeze(0) if part.ndim == 2 else part[:count].squeeze(1) for part in (sin, cos))
        return F.pad(torch.complex(cos.float(), sin.float()), (0, 1), value=1.0)

    def folds(self) -> Folds | None:
        """Returns what folding costs; None where nothing was added."""
        if self.sequences == 0:
            return None
        squares = self.squares.clamp_min(torch.finfo(torch.float64).tiny)
        own = squares.diagonal().unsqueeze(-1)
        return Folds(self.products / squares, (1 - self.products.abs().square() / (squares * own)).clamp(0, 1))
