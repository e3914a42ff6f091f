"""The latent key of hosts with RoPE: one key for all heads, whose pairs keep the rotations of the heads' pairs they stand for.

A head's pair with rotation k is a complex combination of the latent pairs with rotation k. Which pairs, and how many for each
rotation, is decided by energy (``tensor.rotary``); with H*D columns every head finds its own pairs, and nothing is lost.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vit_tucker.attention.host import HostSpec, MHAWeights
from vit_tucker.attention.moments import Moments
from vit_tucker.attention.rope import RopeSpec, spread_rotations
from vit_tucker.tensor.folding import best_fold
from vit_tucker.tensor.joint_latent import leave_room
from vit_tucker.tensor.metric import Root, metric_root
from vit_tucker.tensor.resize import Resized, grow, keep_pairs, resize_factor
from vit_tucker.tensor.rotary import Lifted, lift, rotary_tucker, whiten_rotary
from vit_tucker.tensor.tucker import Tucker
from vit_tucker.tensor.weighted import trace_weights


class LatentKeys(NamedTuple):
    """A latent key of some width, and what the heads make of it.

    Attributes:
        lifted: the pre-softmax tensor in the latent's coordinates; its left mode in the norm of the query metric, its heads
            weighted, its right mode as it is. Its basis projects tokens to the latent, (C, R), with a last row for the key bias
            if the host has one.
        query: root of the query metric, or None.
        weights: of the heads, (H,), or None.
    """

    lifted: Lifted
    query: Root | None
    weights: Tensor | None

    def tucker(self, ranks: tuple[int, int, int]) -> Tucker:
        """Returns the pre-softmax tensor as a Tucker decomposition on this latent: its right factor is the basis."""
        core, head, left, right = rotary_tucker(self.lifted, ranks)
        if self.weights is not None:
            head = head / self.weights[:, None]
        return Tucker(core, head, left if self.query is None else self.query.inverse @ left, right)


def latent_keys(
    weights: MHAWeights,
    rope: RopeSpec,
    width: int,
    moments: Moments | None = None,
    damping: float = 0.0,
    values: Tensor | None = None,
    value_root: Root | None = None,
) -> LatentKeys:
    """Finds the best latent key of a given width.

    Args:
        weights: of the host, float64.
        rope: of the host.
        width: R, even, at most H*D for keys alone.
        moments: of the layer's tokens, for the error on them; None for the error in the weights.
        damping: of the moments' metrics.
        values: columns that values read from the same latent, (C, V), where keys and values share one; weighted.
        value_root: root of the metric (C, C) of these columns; None for the identity.
    """
    tensor, query, key, scale = weights.rotary_pairs(rope), None, None, None
    if moments is not None:
        rows = tensor.left.shape[1]
        columns = tensor.right.shape[1]
        query = metric_root(moments.query[:rows, :rows], damping)
        key = metric_root(moments.key_metric(columns), damping)
        scale = trace_weights(moments.given("key_traces"))
        tensor = whiten_rotary(tensor, query.root, key.root, scale)
    lifted = (
        lift(tensor) if moments is None or moments.rotations is None else best_fold(tensor, moments.rotations, width)
    )
    if key is not None:
        lifted = lifted._replace(basis=key.inverse @ lifted.basis)
    if values is None:
        pairs = lifted.pairs._replace(right=lifted.pairs.right[:, :width])
        lifted = Lifted(pairs, lifted.basis[:, :width], lifted.rotations[: width // 2])
    else:
        heads, _, head_dim = weights.key.shape
        lifted = leave_room(lifted, values, width, spread_rotations(width, heads, head_dim), value_root)
    return LatentKeys(lifted, query, scale)


def value_columns(out: Tensor, value: Tensor) -> Tensor:
    """Returns the heads' values, weighted by what the output projection makes of them, (C, H*D).

    Args:
        out: (H, D, O).
        value: (H, C, D).
    """
    small = torch.linalg.qr(out.mT, mode="r").R  # (H, D, D) with the same inner products
    return (value @ small.mT).transpose(0, 1).flatten(1)


def resize_keys(
    factor: Tensor, gram: Tensor, rank: int, rotations: Tensor | None, spec: HostSpec
) -> tuple[Resized, Tensor | None]:
    """Changes the rank of the latent key, see ``resize_factor``; where its pairs rotate, they stay whole.

    Args:
        factor: (C, r) or, with the key bias as last row, (C + 1, r), float64.
        gram: (r, r).
        rank: even with rotations.
        rotations: numbers of the pairs' rotations, (r/2,), or None.
        spec: of the layer.

    Returns:
        The new factor; the rotations of the pairs that stay, then of new ones.
    """
    if rotations is None or rank == factor.shape[1]:
        return resize_factor(factor, gram, rank, spec.embed_dim), rotations
    if rank < factor.shape[1]:
        new, pairs = keep_pairs(factor, gram, rank)
        return new, rotations[pairs]
    added = spread_rotations(rank - factor.shape[1], spec.num_heads, spec.head_dim).to(rotations)
    return grow(factor, rank, spec.embed_dim), torch.cat([rotations, added])
