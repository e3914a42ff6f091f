"""Converts dense heads to the two Tucker tensors of a layer: by the weights alone, by the moments of its tokens, by regression.

Source: Klein et al., Tucker Attention, arXiv 2603.30033, App. C.1.4 for the HOSVD; the weighted forms and those with RoPE are
ours, see ``tensor.weighted`` and ``tensor.rotary``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vit_tucker.attention.host import MHAWeights
from vit_tucker.attention.latent_rope import latent_keys, value_columns
from vit_tucker.attention.moments import Moments
from vit_tucker.attention.rope import RopeSpec
from vit_tucker.tensor.allocation import Ranks
from vit_tucker.tensor.metric import Root, metric_root
from vit_tucker.tensor.regression import LinearMoments, reduced_rank_readout
from vit_tucker.tensor.tucker import Tucker, apply_pairs, hooi, hosvd, joint_right_basis, tucker_pairs
from vit_tucker.tensor.weighted import joint_weighted_basis, weighted_tucker, whitened_hosvd


class TuckerTarget(NamedTuple):
    """Ranks and options of the layer that a conversion fills.

    Attributes:
        pre: ranks [head, query, key] of the pre-softmax tensor.
        post: ranks [head, output, value] of the post-softmax tensor.
        shared_kv: one basis for keys and values.
        out_bias: the read-out has a bias.
        rope: rotations of the host, or None.
    """

    pre: Ranks
    post: Ranks
    shared_kv: bool
    out_bias: bool
    rope: RopeSpec | None


class TuckerTensors(NamedTuple):
    """Tensors and bias of a Tucker layer.

    Attributes:
        pre: pre-softmax tensor, modes (H, C or C + 1, C), or C + 1 keys with a key bias: biases are the last rows.
        post: post-softmax tensor, modes (H, O, C); its key/value factor equals that of ``pre`` without bias with shared_kv.
        out_bias: (O,) or None.
        rotations: number of the rotation of each latent pair, (R3/2,), with RoPE; else None.
    """

    pre: Tucker
    post: Tucker
    out_bias: Tensor | None
    rotations: Tensor | None = None


def decompose(weights: MHAWeights, target: TuckerTarget, conversion: str = "hosvd") -> TuckerTensors:
    """Decomposes both weight tensors by HOSVD (App. C.1.4) or HOOI; exact at full ranks.

    Args:
        weights: of the host, float64.
        target: ranks and options of the layer.
        conversion: "hosvd", or "hooi" without RoPE and without shared_kv.
    """
    pre_pairs, post_pairs = weights.pre_pairs(), weights.post_pairs()
    out_bias, rotations = weights.folded_out_bias(), None
    if target.rope is not None:
        pre, rotations = rotary_pre(weights, target.rope, target)
        post = hosvd(post_pairs, target.post) if not target.shared_kv else whitened_hosvd(
            post_pairs, target.post, right=pre.right[: weights.key.shape[1]])  # fmt: skip
    elif target.shared_kv:
        basis = joint_right_basis(pre_pairs, post_pairs, target.pre[2])
        pre, post = hosvd(pre_pairs, target.pre, right=basis), hosvd(post_pairs, target.post, right=basis)
    else:
        fit = hooi if conversion == "hooi" else hosvd
        pre, post = fit(pre_pairs, target.pre), fit(post_pairs, target.post)
    return TuckerTensors(pre, post, out_bias, rotations)


def decompose_calibrated(weights: MHAWeights, target: TuckerTarget, moments: Moments, damping: float) -> TuckerTensors:
    """Finds the decompositions with the least error on the tokens, to first order, head by head.

    Query mode: E[x~ x~^T] with x~ = [x, 1]; key mode: how much each head's scores matter (``Moments.key``); value mode: the
    covariance of the heads' averaged tokens, their mean going into the output bias exactly; output mode: E[g g^T].

    Args:
        weights: float64.
        target: of the layer.
        moments: of its tokens, float64.
        damping: of the moments, relative to their mean eigenvalue.
    """
    pre_pairs, post_pairs = weights.pre_pairs(), weights.post_pairs()
    query = moments.query[: pre_pairs.left.shape[1], : pre_pairs.left.shape[1]]
    value, mean = moments.value_metric(target.out_bias), moments.given("value_mean")  # no bias: factors keep the mean
    basis, rotations = None, None
    if target.rope is not None:
        pre, rotations = rotary_pre(weights, target.rope, target, moments, damping, value)
        basis = pre.right[: weights.key.shape[1]] if target.shared_kv else None
    else:
        if target.shared_kv:
            basis = joint_weighted_basis(
                pre_pairs, post_pairs, query, moments.given("key"), moments.output, value, target.pre[2], damping
            )
        pre = weighted_tucker(pre_pairs, target.pre, query, moments.given("key"), damping, basis)
    post = whitened_hosvd(post_pairs, target.post, moments.output, value, damping, basis)
    out_bias = weights.folded_out_bias()
    if out_bias is not None:
        out_bias = out_bias + apply_pairs(post_pairs, mean) - apply_pairs(tucker_pairs(post), mean)
    return TuckerTensors(pre, post, out_bias, rotations)


def rotary_pre(
    weights: MHAWeights,
    rope: RopeSpec,
    target: TuckerTarget,
    moments: Moments | None = None,
    damping: float = 0.0,
    value: Tensor | None = None,
) -> tuple[Tucker, Tensor]:
    """Returns the pre-softmax tensor of a host with RoPE on a latent key, and the rotations of its pairs.

    Args:
        weights: of the host, float64.
        rope: of the host.
        target: ranks and options of the layer.
        moments: of its tokens, float64; None for the error in the weights.
        damping: of the moments, relative to their mean eigenvalue.
        value: (C, C) metric of the values, where they share the latent; None for the identity.
    """
    columns = value_columns(weights.out, weights.value) if target.shared_kv else None
    root = None if value is None or columns is None else metric_root(value, damping)
    keys = latent_keys(weights, rope, target.pre[2], moments, damping, columns, root)
    return keys.tucker(target.pre), keys.lifted.rotations


def refit_post(
    post: Tucker, moments: LinearMoments, bias: bool, out_root: Root, damping: float
) -> tuple[Tucker, Tensor]:
    """Fits output factor, head factor and core of the post-softmax tensor to the host's outputs by reduced-rank regression.

    Args:
        post: the present one, float64; its key/value factor stays.
        moments: of the heads' latent outputs f, (H*r3t), and the host's outputs y.
        bias: the read-out has a bias, so that moments are taken about the means.
        out_root: root of the output metric (O, O).
        damping: ridge towards the present read-out, relative to the mean variance of f.

    Returns:
        the new tensor and the output bias (O,) that goes with it.
    """
    ff, yf, f_mean, y_mean = moments.centred(bias)
    fitted = reduced_rank_readout(ff, yf, post, damping, out_root)
    slices = torch.tensordot(fitted.head, fitted.core, 1)  # S, (H, r2t, r3t)
    readout = (fitted.left @ slices).transpose(0, 1).flatten(1)  # (O, H*r3t)
    return fitted, y_mean - readout @ f_mean
