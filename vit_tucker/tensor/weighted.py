"""Tucker decompositions in weighted norms: the error that counts is the one on the tokens, not the one in the weights.

    loss = sum_i || L (W_i - W^_i) R_i ||_F^2,    L L = left metric,  R_i R_i = right metric of head i

With one right metric for all heads this is a plain HOSVD of the whitened tensor. Heads that see different tokens have different
metrics; then the HOSVD of the mean metric is the start, and a quasi-Newton method (L-BFGS, in whitened coordinates, where a step
has the same size in all directions) finds the rest.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vit_tucker.tensor.metric import identity_root, mean_metric, metric_root
from vit_tucker.tensor.tucker import Pairs, Ranks, Tucker, hosvd, joint_right_basis


def head_weights(metrics: Tensor) -> Tensor:
    """Returns how much each head counts: the root of its metric's trace, the largest 1, none below 1e-3.

    Args:
        metrics: (H, J, J) one positive semidefinite metric per head.

    Returns:
        (H,).

    Raises:
        ValueError: all metrics are zero, since the inputs are constant.
    """
    return trace_weights(metrics.diagonal(dim1=-2, dim2=-1).sum(-1))


def trace_weights(traces: Tensor) -> Tensor:
    """Returns how much each head counts, (H,), by the traces of the heads' metrics: see ``head_weights``.

    Args:
        traces: (H,).

    Raises:
        ValueError: all are zero, since the inputs are constant.
    """
    weights = traces.clamp_min(0).sqrt()
    if not (weights > 0).any():
        raise ValueError("the second moments are zero: the inputs are constant")
    return (weights / weights.max()).clamp_min(1e-3)


def whitened_hosvd(
    pairs: Pairs,
    ranks: Ranks,
    left_metric: Tensor | None = None,
    right_metric: Tensor | None = None,
    damping: float = 1e-3,
    right: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tucker:
    """Computes the HOSVD in the norm of a left and a right metric, and of weights of the heads.

    Args:
        pairs: the tensor (H, I, J).
        ranks: (R1, R2, R3).
        left_metric: (I, I), or None for the identity.
        right_metric: (J, J), or None for the identity.
        damping: see ``metric_root``.
        right: basis (J, R3) of the right mode to use instead of the best.
        weights: (H,), positive: how much each head counts. A head mode cut to less than H keeps what is large; without weights
            that is what is large in numbers, and heads with small scores but much influence are lost. A scale per head costs
            nothing, since the head factor absorbs it.

    Returns:
        Tucker of the tensor itself: the whitening is undone in the factors, which are not orthonormal.

    Source: De Lathauwer et al., 2000, for the whitened tensor.
    """
    left_root, right_root = (
        identity_root(side.shape[1], side) if metric is None else metric_root(metric, damping)
        for side, metric in zip(pairs, (left_metric, right_metric), strict=True)
    )
    scale = torch.ones_like(pairs.left[:, 0, 0]) if weights is None else weights
    whitened = Pairs(left_root.root @ (pairs.left * scale[:, None, None]), right_root.root @ pairs.right)
    basis = None if right is None else torch.linalg.qr(right_root.root @ right).Q
    core, head, left, new_right = hosvd(whitened, ranks, right=basis)
    if right is None:
        return Tucker(core, head / scale[:, None], left_root.inverse @ left, right_root.inverse @ new_right)
    # the core in the given basis instead of the orthonormal one
    core = core @ torch.linalg.lstsq(right_root.root @ right, new_right).solution.mT
    return Tucker(core, head / scale[:, None], left_root.inverse @ left, right)


def weighted_tucker(
    pairs: Pairs,
    ranks: Ranks,
    left_metric: Tensor,
    right_metrics: Tensor,
    damping: float = 1e-3,
    right: Tensor | None = None,
    steps: int = 40,
) -> Tucker:
    """Minimises the weighted error of a Tucker decomposition, each head with its own right metric.

    Args:
        pairs: the tensor (H, I, J), float64.
        ranks: (R1, R2, R3).
        left_metric: (I, I).
        right_metrics: (H, J, J).
        damping: see ``metric_root``.
        right: right factor (J, R3) to keep fixed (a basis shared by two tensors).
        steps: L-BFGS iterations after the whitened HOSVD; none where the ranks are full.

    Returns:
        The decomposition; never worse in the weighted error than ``whitened_hosvd``, its start.
    """
    mean, weights = mean_metric(right_metrics), head_weights(right_metrics)
    start = whitened_hosvd(pairs, ranks, left_metric, mean, damping, right, weights)
    full = (pairs.left.shape[0], min(pairs.left.shape[1], pairs.left.shape[0] * pairs.left.shape[2]),
            min(pairs.right.shape[1], pairs.right.shape[0] * pairs.right.shape[2]))  # fmt: skip
    if steps == 0 or all(rank >= limit for rank, limit in zip(ranks, full, strict=True)):
        return start
    left_root = metric_root(left_metric, damping)
    right_root = metric_root(mean, damping)
    traces = right_metrics.diagonal(dim1=-2, dim2=-1).sum(-1)
    floor = (damping * traces / mean.shape[0]).clamp_min(damping * 1e-6 * traces.max() / mean.shape[0])
    metrics = right_metrics + floor[:, None, None] * torch.eye(mean.shape[0], dtype=mean.dtype, device=mean.device)
    loss = _weighted_error(
        Pairs(left_root.root @ pairs.left, right_root.root @ pairs.right),
        right_root.inverse @ (metrics / traces.mean()) @ right_root.inverse,
    )
    fixed = None if right is None else right_root.root @ right
    factors = [start.head, start.core, left_root.root @ start.left]
    if fixed is None:
        factors.append(right_root.root @ start.right)
    head, core, left, *rest = _minimise(lambda h, c, lo, r=fixed: loss(h, c, lo, r), factors, steps)
    return Tucker(core, head, left_root.inverse @ left, right_root.inverse @ rest[0] if rest else start.right)


def _weighted_error(pairs: Pairs, metrics: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Makes the squared error sum_i tr(E_i K_i E_i^T) of a Tucker, relative, E_i = A_i B_i^T - U2 T_i U3^T.

    Multiplied out, so that nothing larger than the metrics (H, J, J) is formed.
    """
    right_metric = pairs.right.mT @ metrics  # (H, D, J)
    norm = ((pairs.left.mT @ pairs.left) * (right_metric @ pairs.right)).sum()

    def error(head: Tensor, core: Tensor, left: Tensor, right: Tensor) -> Tensor:
        slices = torch.tensordot(head, core, 1)  # T, (H, R2, R3)
        cross = ((left.mT @ pairs.left) @ (right_metric @ right) * slices).sum()
        square = ((left.mT @ left) @ slices @ (right.mT @ (metrics @ right)) * slices).sum()
        return (norm - 2 * cross + square) / norm

    return error


def _minimise(loss: Callable[..., Tensor], start: list[Tensor], steps: int) -> list[Tensor]:
    """Runs L-BFGS from ``start``; returns the start where nothing better was found."""
    with torch.enable_grad():
        variables = [tensor.detach().clone().requires_grad_(True) for tensor in start]
        solver = torch.optim.LBFGS(variables, max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()
            value = loss(*variables)
            value.backward()
            return value

        before = loss(*variables).item()
        solver.step(closure)
        after = loss(*variables).item()
    return [v.detach() for v in variables] if after < before else start


def joint_weighted_basis(
    pre: Pairs,
    post: Pairs,
    query: Tensor,
    key: Tensor,
    output: Tensor,
    value: Tensor,
    rank: int,
    damping: float,
) -> Tensor:
    """Returns one basis (C, rank) for the right modes of two tensors, in the mean of their right metrics.

    Args:
        pre, post: the tensors.
        query, output: (C, C) left metrics of pre and post.
        key: right metrics of pre, one per head (H, C, C).
        value: right metric of post, (C, C).
        rank: width of the basis.
        damping: of the metrics.
    """
    root = metric_root((mean_metric(key) + mean_metric(value[None])) / 2, damping)
    left_pre = metric_root(query, damping).root @ pre.left * head_weights(key)[:, None, None]
    left_post = metric_root(output, damping).root @ post.left
    pair = Pairs(left_pre, root.root @ pre.right), Pairs(left_post, root.root @ post.right)
    return root.inverse @ joint_right_basis(*pair, rank)
