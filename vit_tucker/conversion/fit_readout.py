"""Fits the read-out of a converted layer by ridge regression, whose strength is chosen on held-out sequences.

Features of many heads are nearly collinear, and images resemble each other: an unregularised read-out overfits the calibration
images.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from vit_tucker.attention.module import AttentionModule
from vit_tucker.tensor.metric import Root
from vit_tucker.tensor.regression import LinearMoments

HELD_OUT = 4
"""One sequence of so many is held out."""
RIDGES = (1.0, 10.0, 100.0, 1000.0)
"""Ridges to try, as multiples of the damping; and none of the regression at all."""


@dataclass
class HeldOut:
    """Regression moments of all sequences, apart for those that are held out.

    Attributes:
        kept, held: of the two parts.
        sequences: how many there were.
    """

    kept: LinearMoments
    held: LinearMoments
    sequences: int = 0

    @classmethod
    def like(cls, mixed: Tensor, y: Tensor, centre: bool) -> HeldOut:
        """Returns sums of no sequences yet.

        Args:
            mixed: (B, N, F) features, of the width and dtype of those to come.
            y: (B, N, O) targets.
            centre: subtract the means of these tokens, for a read-out with a bias.
        """
        kept = LinearMoments.like(tokens(mixed), tokens(y), centre)
        return cls(kept, LinearMoments.zeros(kept.f_shift, kept.y_shift))

    def add(self, mixed: Tensor, y: Tensor, weights: Tensor) -> None:
        """Adds sequences to the sums, some of them to the held-out ones.

        Args:
            mixed: (B, N, F) features.
            y: (B, N, O) targets.
            weights: (B, N) weights of the tokens.
        """
        number = torch.arange(len(mixed), device=mixed.device) + self.sequences
        held = number % HELD_OUT == HELD_OUT - 1
        for sums, part in ((self.kept, ~held), (self.held, held)):
            if part.any():
                f = tokens(mixed[part])
                sums.add(f, tokens(y[part]), weights[part].flatten().to(f.dtype))
        self.sequences += len(mixed)


def tokens(x: Tensor) -> Tensor:
    """Flattens (B, N, F) to (B*N, F); float64 stays, anything narrower becomes float32."""
    return (x if x.dtype == torch.float64 else x.float()).flatten(0, -2)


def fit_readout(module: AttentionModule, sums: HeldOut, out_root: Root, damping: float) -> None:
    """Fits the read-out, with the ridge that is best for the held-out sequences; left alone where none gains.

    Args:
        module: converted, in eval mode; called under no_grad.
        sums: of its features and the host's outputs. Fewer than HELD_OUT sequences: the middle ridge, unseen.
        out_root: root of the output metric (O, O).
        damping: unit of the ridges, relative to the mean variance of the features.
    """
    both = sums.kept.plus(sums.held)
    if sums.sequences < HELD_OUT:
        module.fit_readout(both, out_root, RIDGES[len(RIDGES) // 2] * damping)
        return
    start = copy.deepcopy(module.state_dict())
    metric = out_root.root @ out_root.root
    least, best = sums.held.loss(*linear_map(module, len(both.f_sum)), metric), None
    for ridge in RIDGES:
        module.fit_readout(sums.kept, out_root, ridge * damping)
        loss = sums.held.loss(*linear_map(module, len(both.f_sum)), metric)
        module.load_state_dict(start)
        if loss < least:
            least, best = loss, ridge
    if best is not None:
        module.fit_readout(both, out_root, best * damping)


def linear_map(module: AttentionModule, features: int) -> tuple[Tensor, Tensor]:
    """Returns the read-out as a matrix (O, F) and a bias (O,), float64."""
    like = next(module.parameters())
    bias = module.readout(like.new_zeros(1, 1, features))[0, 0]
    columns = module.readout(torch.eye(features, dtype=like.dtype, device=like.device).unsqueeze(0))[0] - bias
    return columns.mT.double(), bias.double()
