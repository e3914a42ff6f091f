"""Layers of ours as multi-head attention: what each head's query, key, value and output weights would be.

Layers that form heads have them. Tucker Attention has them where its matrices W_i = U2 T_i U3^T and Wt_i have rank head_dim at
most, which ranks r2, r3 <= head_dim grant; wider ones can be cut to the nearest matrices of that rank.
"""

from typing import NamedTuple

from torch import Tensor

from vit_tucker.attention.effective import plain_layer
from vit_tucker.attention.heads import PerHeadModule
from vit_tucker.attention.host import MHAWeights
from vit_tucker.attention.module import AttentionModule
from vit_tucker.attention.special_cases import refuse_nonlinear
from vit_tucker.errors import PatchError
from vit_tucker.tensor.split import Split, split_width


class HeadsForm(NamedTuple):
    """A layer's heads.

    Attributes:
        weights: float64, H heads of everything.
        pre_error, post_error: what cutting the pre- and the post-softmax tensor to the heads' width left out, relative to their
            Frobenius norms; 0 if nothing was cut.
    """

    weights: MHAWeights
    pre_error: float = 0.0
    post_error: float = 0.0


def heads_form(layer: AttentionModule, approximate: bool = False, tolerance: float = 1e-9) -> HeadsForm:
    """The layer's heads, of the host's width head_dim.

    Args:
        layer: any layer of ours.
        approximate: cut matrices of larger rank to the nearest of rank head_dim, head by head (least Frobenius norm).
        tolerance: singular values below this share of the largest count as zero.

    Raises:
        PatchError: latent RoPE, or a head's rank is above head_dim and ``approximate`` is not set.
    """
    layer = plain_layer(layer)
    if layer.latent_width is not None:
        raise PatchError("its latent RoPE rotates one key for all heads together, which no heads of their own do")
    if isinstance(layer, PerHeadModule):
        return HeadsForm(layer.dense_weights())
    refuse_nonlinear(layer)
    width = layer.spec.head_dim
    pre, post = (split_width(pairs, width, tolerance) for pairs in (layer.pre_pairs(), layer.post_pairs()))
    if not approximate:
        for split, name in ((pre, "pre-softmax"), (post, "post-softmax")):
            refuse_wide(split, width, name)
    query, bias = pre.pairs.left, None
    if query.shape[1] > layer.spec.embed_dim:
        query, bias = query[:, :-1], query[:, -1]
    out, value = post.pairs
    weights = MHAWeights(query, pre.pairs.right, value, out.mT, query_bias=bias, out_bias=layer.folded_out_bias())
    return HeadsForm(weights, *(error_of(split, width) for split in (pre, post)))


def refuse_wide(split: Split, width: int, name: str) -> None:
    """Raise PatchError for a head whose matrix does not fit into this width; names the widest."""
    rank = max(split.ranks)
    if rank > width:
        raise PatchError(
            f"the {name} matrix of head {split.ranks.index(rank)} has rank {rank}, a dense head holds rank {width} (head_dim)"
        )


def error_of(split: Split, width: int) -> float:
    """What was cut off; below the tolerance of the ranks it is rounding."""
    return split.error if max(split.ranks) > width else 0.0


def fit_biases(weights: MHAWeights, places: MHAWeights) -> MHAWeights:
    """The same attention with biases only where a layer has places for them: they move between values and output, exactly.

    Args:
        weights: H heads, float64.
        places: of the layer; None where it has no such bias.

    Returns:
        Weights whose biases are None or have a place. Softmax rows sum to 1, so that value biases are output biases; key biases
        without a place are left out.

    Raises:
        PatchError: a bias has no place.
    """
    if weights.query_bias is not None and places.query_bias is None and weights.query_bias.any():
        raise PatchError("its query bias has no place in a host without qkv_bias")
    value_bias, out_bias = weights.value_bias, weights.out_bias
    if value_bias is not None and places.value_bias is None:
        value_bias, out_bias = None, weights.folded_out_bias()
    if out_bias is not None and places.out_bias is None:
        if out_bias.any():
            moved = as_value_bias(out_bias, weights.out, places.value_bias is not None)
            value_bias = moved if value_bias is None else value_bias + moved
        out_bias = None
    return MHAWeights(
        weights.query, weights.key, weights.value, weights.out,
        query_bias=weights.query_bias if places.query_bias is not None else None,
        key_bias=weights.key_bias if places.key_bias is not None else None,
        value_bias=value_bias,
        out_bias=out_bias,
    )  # fmt: skip


def as_value_bias(out_bias: Tensor, out: Tensor, has_place: bool) -> Tensor:
    """Value biases with sum_i bV_i WO_i = b, the smallest. (O,), (H, D, O) -> (H, D)"""
    if not has_place:
        raise PatchError("its output bias has no place in a host without proj_bias and qkv_bias")
    stacked = out.flatten(0, 1).mT  # (O, H*D)
    bias = (stacked.pinverse() @ out_bias).unflatten(0, out.shape[:2])
    if (stacked @ bias.flatten() - out_bias).norm() > 1e-9 * out_bias.norm():
        raise PatchError("its output bias has no place in a host without proj_bias: no value bias comes to it")
    return bias
