"""Linear read-outs from second moments: ridge regression towards a prior, at full or at reduced rank.

    minimise E|| y - R f - b ||^2_M + ridge || R - R0 ||^2
With the prior R0 an exact read-out stays exact, whatever the ridge.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vit_tucker.tensor.metric import Root, damped, solve
from vit_tucker.tensor.tucker import Tucker, leading_eigenvectors


@dataclass
class LinearMoments:
    """Weighted sums over tokens for the regression of y on f.

    Attributes:
        count: () sum of the weights.
        f_sum, y_sum: (F,), (O,).
        ff: sum of f f^T, (F, F).
        yf: sum of y f^T, (O, F).
        f_shift, y_shift: (F,), (O,), subtracted from f and y before summing, so that large means cost no precision.
    """

    count: Tensor
    f_sum: Tensor
    y_sum: Tensor
    ff: Tensor
    yf: Tensor
    f_shift: Tensor
    y_shift: Tensor

    @classmethod
    def like(cls, f: Tensor, y: Tensor, centre: bool) -> "LinearMoments":
        """Returns empty sums for features (n, F) and targets (n, O); their means are the shifts if ``centre``.

        Args:
            f: (n, F) features.
            y: (n, O) targets.
            centre: shift by the means of these tokens, for a regression with a bias.
        """
        return cls.zeros(*(t.mean(0) if centre else torch.zeros_like(t[0]) for t in (f, y)))

    @classmethod
    def zeros(cls, f_shift: Tensor, y_shift: Tensor) -> "LinearMoments":
        """Returns empty sums; two sums with the same shifts can be added.

        Args:
            f_shift: (F,) subtracted from all features.
            y_shift: (O,) subtracted from all targets.
        """
        f, o = len(f_shift), len(y_shift)
        shapes: tuple[tuple[int, ...], ...] = ((), (f,), (o,), (f, f), (o, f))
        count, f_sum, y_sum, ff, yf = (f_shift.new_zeros(shape, dtype=torch.float64) for shape in shapes)
        return cls(count, f_sum, y_sum, ff, yf, f_shift, y_shift)

    def add(self, f: Tensor, y: Tensor, weights: Tensor) -> None:
        """Adds features (n, F) and targets (n, O) with weights (n,).

        Args:
            f: (n, F) features.
            y: (n, O) targets.
            weights: (n,) weights of the tokens, not negative.
        """
        f, y = f - self.f_shift, y - self.y_shift
        weighted = f * weights[:, None]
        self.count += weights.sum().double()
        self.f_sum += weighted.sum(0).double()
        self.y_sum += (y * weights[:, None]).sum(0).double()
        self.ff += (weighted.mT @ f).double()
        self.yf += (y.mT @ weighted).double()

    def plus(self, other: "LinearMoments") -> "LinearMoments":
        """Returns the sums over the tokens of both.

        Args:
            other: sums with the same shifts.
        """
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("count", "f_sum", "y_sum", "ff", "yf")}
        return replace(self, **sums)

    def loss(self, readout: Tensor, bias: Tensor, metric: Tensor) -> float:
        """Returns the summed error of y^ = R f + b in a metric, up to the constant that is its value for y^ = 0 after the shifts.

        Args:
            readout: R, (O, F), float64.
            bias: b, (O,).
            metric: (O, O).
        """
        left = metric @ readout
        rest = self.y_shift.double() - readout @ self.f_shift.double() - bias
        squares = (left * (readout @ self.ff - 2 * self.yf)).sum()
        means = 2 * (metric @ rest) @ (self.y_sum - readout @ self.f_sum)
        return (squares + means + self.count * rest @ metric @ rest).item()

    def centred(self, has_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the covariances ff (F, F) and yf (O, F) and the means of f (F,) and y (O,).

        Args:
            has_bias: False: raw second moments and zero means.
        """
        f_mean, y_mean = self.f_sum / self.count, self.y_sum / self.count
        ff, yf = self.ff / self.count, self.yf / self.count
        if not has_bias:
            return ff, yf, torch.zeros_like(f_mean), torch.zeros_like(y_mean)
        ff, yf = ff - f_mean[:, None] * f_mean, yf - y_mean[:, None] * f_mean
        return ff, yf, f_mean + self.f_shift.double(), y_mean + self.y_shift.double()


def ridge_readout(ff: Tensor, yf: Tensor, prior: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Returns the best read-out (O, F) at full rank, and the feature metric, ff + ridge.

    Args:
        ff: (F, F) feature (co)variance.
        yf: (O, F).
        prior: R0, (O, F).
        damping: ridge relative to the mean variance of the features.
    """
    metric = damped(ff, damping)
    # R - R0 solves (R - R0)(ff + ridge) = yf - R0 ff: zero where R0 already explains y
    return prior + solve(metric, yf - prior @ ff), metric


def reduced_rank_readout(
    ff: Tensor, yf: Tensor, prior: Tucker, damping: float, out_root: Root, sweeps: int = 6
) -> Tucker:
    """Returns the best read-out sum_i U2 S_i f_i, S = C x1 U1, from features f = (f_1, ..., f_H) of R3 each.

    At full head rank the exact minimum: reduced-rank regression. Below, head factor and the rest in turns, each exactly.

    Args:
        ff: (H*R3, H*R3).
        yf: (O, H*R3).
        prior: the read-out to start from and to lean to: core (R1, R2, R3), head (H, R1), left (O, R2), right untouched.
        damping: ridge relative to the mean variance of the features.
        out_root: root of the output metric (O, O).
        sweeps: turns at head rank below H.

    Returns:
        prior with new core, head and left factor.

    Source: Izenman, Reduced-rank regression for the multivariate linear model, 1975.
    """
    heads, (r1, r2, r3) = prior.head.shape[0], prior.core.shape
    slices = torch.tensordot(prior.head, prior.core, 1)  # (H, R2, R3)
    dense = (prior.left @ slices).transpose(0, 1).flatten(1)  # (O, H*R3)
    full, metric = ridge_readout(ff, yf, dense, damping)
    best = out_root.root @ full
    target = best @ metric  # cross moments of the damped problem
    if r1 == heads:  # Eckart-Young: the best read-out, cut to the leading directions of its outputs
        left = leading_eigenvectors(target @ best.mT, r2)
        core = (left.mT @ best).unflatten(1, (heads, r3)).transpose(0, 1)
        eye = torch.eye(heads, dtype=ff.dtype, device=ff.device)
        return Tucker(core, eye, out_root.inverse @ left, prior.right)
    head = prior.head
    blocks = metric.unflatten(0, (heads, r3)).unflatten(2, (heads, r3))  # (H, R3, H, R3)
    cross = target.unflatten(1, (heads, r3))  # (O, H, R3)
    left, core = _best_left_and_core(blocks, cross, head, r2)
    for _ in range(sweeps):
        head = _best_head(blocks, cross, left, core)
        left, core = _best_left_and_core(blocks, cross, head, r2)
    return Tucker(core, head, out_root.inverse @ left, prior.right)


def _best_left_and_core(blocks: Tensor, cross: Tensor, head: Tensor, r2: int) -> tuple[Tensor, Tensor]:
    """Solves reduced-rank regression on the mixed features sum_i U1[i, a] f_i: (O, R2) and (R1, R2, R3)."""
    mixed = torch.einsum("ha,hrks,kb->arbs", head, blocks, head).flatten(0, 1).flatten(1)  # (R1*R3, R1*R3)
    projected = torch.einsum("ohr,ha->oar", cross, head).flatten(1)
    readout = solve(damped(mixed, 1e-12), projected)
    left = leading_eigenvectors(projected @ readout.mT, r2)
    core = (left.mT @ readout).unflatten(1, (head.shape[1], -1))  # (R2, R1, R3)
    return left, core.transpose(0, 1)


def _best_head(blocks: Tensor, cross: Tensor, left: Tensor, core: Tensor) -> Tensor:
    """Returns the head factor (H, R1) for given left factor and core: least squares, then orthonormal columns."""
    heads, r1 = blocks.shape[0], core.shape[0]
    normal = torch.einsum("aqr,hrks,bqs->hakb", core, blocks, core).flatten(0, 1).flatten(1)
    right_side = torch.einsum("oq,ohr,aqr->ha", left, cross, core).flatten()
    solution = solve(damped(normal, 1e-12), right_side.unsqueeze(0))
    return torch.linalg.qr(solution.view(heads, r1)).Q
