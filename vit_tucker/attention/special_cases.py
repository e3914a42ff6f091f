"""MHA, MQA, GQA and MLA as Tucker Attention, and back: the special cases of the paper, as conversions that are exact.

    method   ranks of the pre-softmax tensor   ranks of the post-softmax tensor   (d embed_dim, H heads, D head width)
    MHA      (H, d, d)                         (H, d, d)                          Thm B.2
    GQA      (H, d, G*D), MQA with G = 1       (H, d, G*D)                        Thm B.3
    MLA      (H, cQ, cKV)                      (H, min(d, H*cKV), cKV)            Thm B.4

A query bias is one more coordinate of the query mode: where the queries have fewer than d columns (MLA) it costs one rank.
With RoPE the key ranks are H*D, G*D (H*D again if each head rotates by angles of its own) and cKV: the latent key holds the very
columns that rotate, so that latent RoPE contains RoPE of the heads.

Back, each head's query, key, value and output weights: layers that form heads have them. Tucker Attention has them where its
matrices W_i = U2 T_i U3^T and Wt_i have rank head_dim at most, which ranks r2, r3 <= head_dim grant; wider ones can be cut.
Source: Klein et al., Tucker Attention, arXiv 2603.30033, Appendix B.
"""

import copy
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from vit_tucker.attention.backends import AUTO, is_whole
from vit_tucker.attention.effective import plain_layer, trains
from vit_tucker.attention.heads import PerHeadModule
from vit_tucker.attention.host import MHAWeights
from vit_tucker.attention.module import AttentionModule
from vit_tucker.attention.variants.mha import MHA, MHAConfig
from vit_tucker.attention.variants.tucker.layer import TuckerAttention
from vit_tucker.errors import PatchError
from vit_tucker.tensor.split import Split, split_width
from vit_tucker.tensor.tucker import Tucker

Form = TypeVar("Form", bound=AttentionModule)


class DenseTensors(NamedTuple):
    """The tensors that a layer's attention is equal to, float64.

    Attributes:
        pre: W_i, (H, C, C), or (H, C + 1, C) with the query bias as the last row.
        post: Wt_i, (H, C, O): used as x @ Wt_i (Eq 5; the stacked tensor holds the transposes).
        out_bias: (O,), the value biases folded in; None if there is none.
    """

    pre: Tensor
    post: Tensor
    out_bias: Tensor | None


def to_dense(layer: AttentionModule) -> DenseTensors:
    """Forms W_i = WQ_i WK_i^T and Wt_i = WV_i WO_i of any layer of ours in full.

    Args:
        layer: MHA, GQA, MLA or Tucker, without query/key norms, gates or RoPE.

    Raises:
        PatchError: the layer's attention is not bilinear in its tokens.
    """
    layer = plain_layer(layer)
    refuse_nonlinear(layer)
    return DenseTensors(layer.pre_pairs().dense(), layer.post_pairs().dense().mT, layer.folded_out_bias())


def to_tucker(layer: AttentionModule) -> TuckerAttention:
    """Returns the same attention as a Tucker layer, with the ranks of Thms B.2-B.4 (see the module's table).

    Nothing is approximated: bases are the layer's own projections, the cores select or multiply their columns.

    Args:
        layer: MHA, GQA (MQA), MLA or Tucker, without query/key norms or gates; biases and RoPE included.

    Returns:
        A Tucker layer with the layer's device, dtype, dropout and mode.

    Raises:
        PatchError: the layer's attention is not bilinear in its tokens.
    """
    refuse_nonlinear(layer, rope=True)
    plain = plain_layer(layer)
    pre, post = plain.tucker_form()
    like = next(plain.parameters())
    tucker = TuckerAttention(plain.spec, ranks_of(pre), ranks_of(post), shared_kv=pre.right is post.right,
                             device=like.device, dtype=like.dtype)  # fmt: skip
    with torch.no_grad():
        rotations = None if plain.spec.rope is None else plain.latent_rotations()
        tucker.set_tensors(pre, post, plain.folded_out_bias(), rotations)
    return with_settings(tucker, layer, plain, layer.backend)


def to_mha(layer: AttentionModule, tolerance: float = 1e-9) -> MHA:
    """Returns the same attention as multi-head attention; each W_i and Wt_i must have rank head_dim at most.

    Args:
        layer: any layer of ours, without query/key norms, gates or RoPE.
        tolerance: singular values below this share of the largest count as zero.

    Returns:
        An MHA layer with the layer's device, dtype, dropout and mode.

    Raises:
        PatchError: a head's rank is above head_dim, a bias has no place, or the attention is not bilinear.
    """
    refuse_nonlinear(layer)
    weights = heads_form(layer, tolerance=tolerance).weights
    plain = plain_layer(layer)
    like = next(plain.parameters())
    mha = MHAConfig().build(layer.spec, device=like.device, dtype=like.dtype)
    places = mha.dense_weights()
    with torch.no_grad():
        mha.convert_from(fit_biases(weights, places))
    return with_settings(mha, layer, plain, AUTO if is_whole(layer.backend) else layer.backend)


class HeadsForm(NamedTuple):
    """The multi-head form of a layer, and what it leaves out.

    Attributes:
        weights: float64, H heads of everything.
        pre_error, post_error: what cutting the pre- and the post-softmax tensor to the heads' width left out, relative to their
            Frobenius norms; 0 if nothing was cut.
    """

    weights: MHAWeights
    pre_error: float = 0.0
    post_error: float = 0.0


def heads_form(layer: AttentionModule, approximate: bool = False, tolerance: float = 1e-9) -> HeadsForm:
    """Returns the layer's heads, of the host's width head_dim.

    Args:
        layer: any layer of ours.
        approximate: cut matrices of larger rank to the nearest of rank head_dim, head by head (least Frobenius norm).
        tolerance: singular values below this share of the largest count as zero.

    Raises:
        PatchError: latent RoPE, or a head's rank is above head_dim and ``approximate`` is not set.
    """
    layer = plain_layer(layer)
    if layer.latent_width is not None:
        raise PatchError("its latent RoPE rotates one key for all heads, which multi-head attention can't")
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
    # below the tolerance of the ranks an error is rounding
    return HeadsForm(weights, *(split.error if max(split.ranks) > width else 0.0 for split in (pre, post)))


def refuse_wide(split: Split, width: int, name: str) -> None:
    """Raises PatchError for a head whose matrix does not fit into this width; names the widest.

    Args:
        split: the matrices of all heads.
        width: head_dim of the dense layer.
        name: of the tensor, for the message.
    """
    rank = max(split.ranks)
    if rank > width:
        raise PatchError(
            f"the {name} matrix of head {split.ranks.index(rank)} has rank {rank}, dense heads have at most {width} (head_dim)"
        )


def fit_biases(weights: MHAWeights, places: MHAWeights) -> MHAWeights:
    """Moves biases between values and output, exactly, so that there are only those that a layer has places for.

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
    """Returns the smallest value biases (H, D) with sum_i bV_i WO_i = b; raises PatchError if there are none, or no place.

    Args:
        out_bias: b, (O,).
        out: WO, (H, D, O).
        has_place: the layer has value biases; False: refuse.
    """
    if not has_place:
        raise PatchError("its output bias has no place in a host without proj_bias and qkv_bias")
    stacked = out.flatten(0, 1).mT  # (O, H*D)
    bias = (stacked.pinverse() @ out_bias).unflatten(0, out.shape[:2])
    if (stacked @ bias.flatten() - out_bias).norm() > 1e-9 * out_bias.norm():
        raise PatchError("its output bias has no place in a host without proj_bias: no value bias equals it")
    return bias


def refuse_nonlinear(layer: AttentionModule, rope: bool = False) -> None:
    """Raises PatchError for a layer whose scores or outputs pass through a norm or a gate; with RoPE, unless ``rope``."""
    features = [*layer.extras, *(["RoPE"] if layer.spec.rope is not None and not rope else [])]
    if features:
        raise PatchError(f"{type(layer).__name__} with {', '.join(features)} is not bilinear in its tokens")


def with_settings(new: Form, layer: AttentionModule, plain: AttentionModule, backend: str) -> Form:
    """Returns a new layer with the settings of another and a copy of the position bias of its plain form.

    Args:
        new: changed in place.
        layer: whose fused_attn, requires_grad and train/eval mode are copied.
        plain: its plain form.
        backend: name of the new layer's backend.
    """
    new.fused_attn, new.backend = layer.fused_attn, backend
    new.position_bias = copy.deepcopy(plain.position_bias)
    layer.hand_place_to(new)
    return new.requires_grad_(trains(layer)).train(layer.training)


def ranks_of(tucker: Tucker) -> tuple[int, int, int]:
    """Returns the ranks (R1, R2, R3) of a decomposition."""
    r1, r2, r3 = tucker.core.shape
    return r1, r2, r3
