"""Converts dense heads to the latents of MLA: best low-rank factors of their projections, by the weights alone or by moments."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vit_tucker.attention.host import MHAWeights
from vit_tucker.attention.latent_rope import latent_keys
from vit_tucker.attention.linear import join_heads
from vit_tucker.attention.moments import Moments
from vit_tucker.attention.rope import RopeSpec, adjacent_pairs
from vit_tucker.tensor.metric import Root, identity_root, metric_root
from vit_tucker.tensor.selector import basis_and_columns
from vit_tucker.tensor.tucker import Tucker, leading_eigenvectors


class MLATarget(NamedTuple):
    """Widths and options of the layer that a conversion fills.

    Attributes:
        query: width of the query latent, cQ.
        key_value: width of the key/value latent, cKV.
        shared_kv: keys and values share one latent.
        rope: rotations of the host where the latent key rotates, or None.
    """

    query: int
    key_value: int
    shared_kv: bool
    rope: RopeSpec | None


class KeyValue(NamedTuple):
    """Projections of keys and values, down (C, cKV) and up (cKV, H*D).

    There are biases of the latent key and of the heads' keys, and numbers of the rotations of the latent pairs, (cKV/2,).
    """

    k_down: Tensor
    k_up: Tensor
    v_down: Tensor
    v_up: Tensor
    k_bias: Tensor | None = None
    down_bias: Tensor | None = None
    rotations: Tensor | None = None


class Latents(NamedTuple):
    """Weights of an MLA layer, the output projection apart.

    Attributes:
        q_down, q_up: (C, cQ) and (cQ, H*D); with rotated latent keys each head's pairs are side by side.
        q_bias, v_bias: of the heads' queries and values, (H*D,), or None.
        key_value: the rest.
    """

    q_down: Tensor
    q_up: Tensor
    q_bias: Tensor | None
    v_bias: Tensor | None
    key_value: KeyValue


def fit_latents(
    weights: MHAWeights, target: MLATarget, moments: Moments | None = None, damping: float = 0.0
) -> Latents:
    """Fits a shared latent by the SVD of [WK | WV] and the query latent by that of WQ; exact at full rank.

    With moments the SVDs are weighted by the tokens' covariance on one side and by the gradients of queries, keys and values on
    the other; query and value biases absorb the tokens' mean.

    Args:
        weights: of the host, float64.
        target: widths and options of the layer.
        moments: of its tokens, float64; None for the error in the weights.
        damping: of the moments, relative to their mean eigenvalue.
    """
    query, value = join_heads(weights.query), join_heads(weights.value)  # (C, H*D)
    q_bias, v_bias = (None if bias is None else bias.flatten() for bias in (weights.query_bias, weights.value_bias))
    metrics = read_metrics(moments, q_bias is not None, damping)
    q_down, q_up = latent(query, target.query, metrics.tokens, metrics.query_grad)
    if target.rope is None:
        parts = plain_latents(weights, target, metrics)
    else:
        parts = rotary_latents(weights, target, target.rope, metrics, moments, damping)
    if moments is not None and q_bias is not None and v_bias is not None:
        q_bias = q_bias + moments.mean @ (query - q_down @ q_up)
        v_bias = v_bias + moments.mean @ (value - parts.v_down @ parts.v_up)
    if target.shared_kv and parts.down_bias is not None and v_bias is not None:
        v_bias = v_bias - parts.down_bias @ parts.v_up  # values that share the keys' bias: a constant
    if target.rope is not None:  # pairs side by side, as the latent keys have them
        q_up = paired(q_up, len(weights.query), target.rope)
        q_bias = None if q_bias is None else paired(q_bias, len(weights.query), target.rope)
    return Latents(q_down, q_up, q_bias, v_bias, parts)


def paired(x: Tensor, heads: int, rope: RopeSpec) -> Tensor:
    """Reorders columns of the heads so that the two of each rotation are side by side.

    Args:
        x: (..., H*D).
        heads: H.
        rope: of the host.
    """
    return adjacent_pairs(x.unflatten(-1, (heads, -1)), rope.half).flatten(-2)


def plain_latents(weights: MHAWeights, target: MLATarget, metrics: "ErrorMetrics") -> KeyValue:
    """Finds the best latents of keys and values of a host without RoPE.

    Args:
        weights, target: as of ``fit_latents``.
        metrics: of the errors.
    """
    key, value = join_heads(weights.key), join_heads(weights.value)
    width, rank = key.shape[1], target.key_value
    k_bias = None if weights.key_bias is None else weights.key_bias.flatten()
    if target.shared_kv:
        down, up = latent(torch.cat([key, value], -1), rank, metrics.tokens, metrics.kv_grad)
        return KeyValue(down, up[:, :width], down, up[:, width:], k_bias=k_bias)
    k_grad, v_grad = metrics.parts(width)
    return KeyValue(*latent(key, rank, metrics.tokens, k_grad), *latent(value, rank, metrics.tokens, v_grad), k_bias)


def rotary_latents(
    weights: MHAWeights,
    target: MLATarget,
    rope: RopeSpec,
    metrics: "ErrorMetrics",
    moments: Moments | None,
    damping: float,
) -> KeyValue:
    """Finds the best latents of a host with RoPE, where latent pairs keep rotations of the heads' pairs.

    Args:
        weights, target, moments, damping: as of ``fit_latents``.
        rope: of the host.
        metrics: of the errors.
    """
    value, rank = join_heads(weights.value), target.key_value
    width, (_, v_grad) = len(value), metrics.parts(value.shape[1])
    shared = None if not target.shared_kv else value if v_grad is None else value @ v_grad
    keys = latent_keys(weights, rope, rank, moments, damping, shared, metrics.tokens)
    basis = keys.lifted.basis
    k_down, k_up = basis[:width], join_heads(keys.lifted.pairs.right)
    bias = basis[width] if len(basis) > width else None
    if not target.shared_kv:
        v_down, v_up = latent(value, rank, metrics.tokens, v_grad)
    else:
        root = identity_root(width, value).root if metrics.tokens is None else metrics.tokens.root
        v_down, v_up = k_down, torch.linalg.lstsq(root @ k_down, root @ value).solution
    return KeyValue(k_down, k_up, v_down, v_up, down_bias=bias, rotations=keys.lifted.rotations)


class ErrorMetrics(NamedTuple):
    """Roots of what errors cost; None for the error in the weights.

    Attributes:
        tokens: of the tokens, (C, C).
        query_grad: of the gradients with respect to the queries, (H*D, H*D).
        kv_grad: the same for keys, then values, (2*H*D, 2*H*D).
    """

    tokens: Root | None
    query_grad: Tensor | None
    kv_grad: Tensor | None

    def parts(self, width: int) -> tuple[Tensor | None, Tensor | None]:
        """Returns roots for keys and for values alone, of ``width`` H*D."""
        if self.kv_grad is None:
            return None, None
        square = self.kv_grad @ self.kv_grad
        return metric_root(square[:width, :width]).root, metric_root(square[width:, width:]).root


def read_metrics(moments: Moments | None, centred: bool, damping: float) -> ErrorMetrics:
    """Returns the metrics of errors from the moments of a layer.

    Args:
        moments: of the layer; None for the error in the weights.
        centred: biases absorb the tokens' mean, so that an error in it costs nothing.
        damping: of the metrics, relative to their mean eigenvalue.
    """
    if moments is None:
        return ErrorMetrics(None, None, None)
    tokens = moments.token_covariance if centred else moments.query[:-1, :-1]
    grads = (metric_root(grad, damping).root for grad in (moments.given("query_grad"), moments.given("kv_grad")))
    return ErrorMetrics(metric_root(tokens, damping), *grads)


def latent(matrix: Tensor, rank: int, left: Root | None = None, right: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Finds the best factors of a matrix (C, K), matrix ~ down @ up, by an SVD through the Gram; weighted if roots are given.

    Args:
        matrix: (C, K).
        rank: width of the latent.
        left: (C, C) root of the metric of the rows; None for the identity.
        right: (K, K) root of the metric of the columns; None for the identity.

    Returns:
        down (C, rank) and up (rank, K), with the least ||left (matrix - down up) right||_F.
    """
    whitened = matrix if left is None else left.root @ matrix
    weighted = whitened if right is None else whitened @ right
    basis = leading_eigenvectors(weighted @ weighted.mT, min(rank, len(matrix)))
    basis = pad(basis, (0, rank - basis.shape[1]))  # rotated keys may need more columns than tokens have
    return basis if left is None else left.inverse @ basis, basis.mT @ whitened


def tucker_of_latents(
    weights: MHAWeights, downs: tuple[Tensor, Tensor, Tensor], ups: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tucker, Tucker]:
    """Returns exact Tucker decompositions (Thm B.4): the bases are the down projections, the core multiplies the up projections.

    A query bias adds the coordinate 1 to the query latent.

    Args:
        weights: of the layer's heads, float64.
        downs: of queries (C, cQ), of keys (C, cKV) or, with a bias, (C + 1, cKV), of values (C, cKV).
        ups: of each head's queries (H, cQ, D), keys and values (H, cKV, D).
    """
    (q_basis, k_basis, v_basis), (q_up, k_up, v_up) = downs, ups
    heads, width = len(q_up), q_up.shape[2]
    if weights.query_bias is not None:
        q_basis = torch.block_diag(q_basis, torch.ones(1, 1, dtype=q_basis.dtype, device=q_basis.device))
        q_up = torch.cat([q_up, weights.query_bias.unsqueeze(1)], 1)
    eye = torch.eye(heads, dtype=q_basis.dtype, device=q_basis.device)
    if q_basis.shape[1] > heads * width:  # more coordinates than the heads have columns: those are the smaller basis
        q_basis, q_up = basis_and_columns(weights.pre_pairs().left)
    pre = Tucker(q_up @ k_up.mT, eye, q_basis, k_basis)
    if heads * v_up.shape[1] < min(weights.out.shape[2], heads * width):
        out_basis, columns = basis_and_columns((v_up @ weights.out).mT)  # of the latents' outputs, (H, O, cKV)
        return pre, Tucker(columns, eye, out_basis, v_basis)
    out_basis, columns = basis_and_columns(weights.out.mT)
    return pre, Tucker(columns @ v_up.mT, eye, out_basis, v_basis)
