"""MHA, MQA, GQA and MLA as Tucker Attention, and back: the special cases of the paper, as conversions that are exact.

    method   ranks of the pre-softmax tensor   ranks of the post-softmax tensor   (d embed_dim, H heads, D head width)
    MHA      (H, d, d)                         (H, d, d)                          Thm B.2
    GQA      (H, d, G*D), MQA with G = 1       (H, d, G*D)                        Thm B.3
    MLA      (H, cQ, cKV)                      (H, min(d, H*cKV), cKV)            Thm B.4

A query bias is one more coordinate of the query mode: where the queries have fewer than d columns (MLA) it costs one rank.
With RoPE the key ranks are H*D, G*D (H*D again if each head rotates by angles of its own) and cKV: the latent key holds the very
columns that rotate, so that latent RoPE contains RoPE of the heads.
Source: Klein et al., Tucker Attention, arXiv 2603.30033, Appendix B.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from vit_tucker.attention.backends import AUTO, is_whole
from vit_tucker.attention.effective import plain_layer, trains
from vit_tucker.attention.module import AttentionModule
from vit_tucker.attention.variants.mha import MHA, MHAConfig
from vit_tucker.attention.variants.tucker.layer import TuckerAttention
from vit_tucker.errors import PatchError
from vit_tucker.tensor.split import split_width
from vit_tucker.tensor.tucker import Pairs, Tucker


class DenseTensors(NamedTuple):
    """The tensors that a layer's attention comes to, float64.

    Attributes:
        pre: W_i, (H, C, C), or (H, C + 1, C) with the query bias as the last row.
        post: Wt_i, (H, C, O): used as x @ Wt_i (Eq 5; the stacked tensor holds the transposes).
        out_bias: (O,), the value biases folded in; None if there is none.
    """

    pre: Tensor
    post: Tensor
    out_bias: Tensor | None


def to_dense(layer: AttentionModule) -> DenseTensors:
    """W_i = WQ_i WK_i^T and Wt_i = WV_i WO_i of any layer of ours, formed in full.

    Args:
        layer: MHA, GQA, MLA or Tucker, without query/key norms, gates or RoPE.

    Raises:
        PatchError: the layer's attention is not bilinear in its tokens.
    """
    layer = plain_layer(layer)
    refuse_nonlinear(layer)
    return DenseTensors(layer.pre_pairs().dense(), layer.post_pairs().dense().mT, layer.folded_out_bias())


def to_tucker(layer: AttentionModule) -> TuckerAttention:
    """The same attention as a Tucker layer, with the ranks of Thms B.2-B.4 (see the module's table).

    Nothing is approximated: bases are the layer's own projections, the cores select or multiply their columns.

    Args:
        layer: MHA, GQA (MQA), MLA or Tucker, without query/key norms or gates; biases and RoPE included.

    Returns:
        A Tucker layer with the layer's device, dtype, dropout and mode.

    Raises:
        PatchError: the layer's attention is not bilinear in its tokens.
    """
    refuse_nonlinear(layer, rope=True)
    given, layer = layer, plain_layer(layer)
    spec = layer.spec
    like = next(layer.parameters())
    pre, post = layer.tucker_form()
    shared = pre.right is post.right
    tucker = TuckerAttention(
        spec, ranks_of(pre), ranks_of(post), shared_kv=shared, device=like.device, dtype=like.dtype
    )
    tucker.fused_attn, tucker.backend = layer.fused_attn, layer.backend
    with torch.no_grad():
        rotations = None if spec.rope is None else layer.latent_columns()
        tucker.set_tensors(pre, post, layer.folded_out_bias(), rotations)
    keep_position_bias(layer, tucker)
    return tucker.requires_grad_(trains(given)).train(layer.training)


def to_mha(layer: AttentionModule, tolerance: float = 1e-9) -> MHA:
    """The same attention as multi-head attention, where the ranks allow it: each W_i and Wt_i must have rank head_dim at most.

    Args:
        layer: any layer of ours, without query/key norms, gates or RoPE.
        tolerance: singular values below this share of the largest count as zero.

    Returns:
        An MHA layer with the layer's device, dtype, dropout and mode. Key and value biases are zero: the former cancel, the
        latter are in the output bias.

    Raises:
        PatchError: a head's rank is above head_dim, a bias has no place, or the attention is not bilinear.
    """
    refuse_nonlinear(layer)
    given, layer = layer, plain_layer(layer)
    spec, out_bias = layer.spec, layer.folded_out_bias()
    like = next(layer.parameters())
    mha = MHAConfig().build(spec, device=like.device, dtype=like.dtype)
    mha.fused_attn = layer.fused_attn
    mha.backend = AUTO if is_whole(layer.backend) else layer.backend
    if out_bias is not None and mha.proj.bias is None:
        raise PatchError("the layer's output bias has no place in MHA without proj_bias")
    left, right = split_rank(layer.pre_pairs(), spec.head_dim, tolerance, "pre-softmax")
    out, value = split_rank(layer.post_pairs(), spec.head_dim, tolerance, "post-softmax")
    query, bias = left[:, : spec.embed_dim], left[:, spec.embed_dim :]  # (H, C, D), and (H, 1, D) or (H, 0, D)
    if bias.numel() and mha.qkv.bias is None:
        raise PatchError("the layer's query bias has no place in MHA without qkv_bias")
    weight = torch.cat([w.movedim(0, 1).flatten(1).mT for w in (query, right, value)])  # (3*H*D, C)
    with torch.no_grad():
        mha.qkv.weight.copy_(weight)
        if mha.qkv.bias is not None:
            mha.qkv.bias.zero_()
            if bias.numel():
                mha.qkv.bias[: spec.attn_dim].copy_(bias.flatten())
        mha.proj.weight.copy_(out.mT.flatten(0, 1).mT)
        if mha.proj.bias is not None:
            mha.proj.bias.zero_()
            if out_bias is not None:
                mha.proj.bias.copy_(out_bias)
    keep_position_bias(layer, mha)
    return mha.requires_grad_(trains(given)).train(layer.training)


def split_rank(tensor: Pairs, rank: int, tolerance: float, name: str) -> tuple[Tensor, Tensor]:
    """Each head's matrix as left @ right^T of the given width, balanced. -> (H, I, rank), (H, J, rank)

    Raises:
        PatchError: a head has a larger rank; names the head and its rank.
    """
    pairs, ranks, _ = split_width(tensor, rank, tolerance)
    for head, found in enumerate(ranks):
        if found > rank:
            raise PatchError(
                f"the {name} matrix of head {head} has rank {found}, MHA holds rank {rank} (head_dim) at most"
            )
    return pairs


def refuse_nonlinear(layer: AttentionModule, rope: bool = False) -> None:
    """Raise PatchError for a layer whose scores or outputs pass through a norm or a gate; with RoPE, unless ``rope``."""
    features = [*layer.extras, *(["RoPE"] if layer.spec.rope is not None and not rope else [])]
    if features:
        raise PatchError(f"{type(layer).__name__} with {', '.join(features)} is not bilinear in its tokens")


def keep_position_bias(layer: AttentionModule, new: AttentionModule) -> None:
    """Give a new layer a copy of the other's position bias, which adds to the scores whatever made them."""
    new.position_bias = copy.deepcopy(layer.position_bias)


def ranks_of(tucker: Tucker) -> tuple[int, int, int]:
    """(R1, R2, R3)"""
    r1, r2, r3 = tucker.core.shape
    return r1, r2, r3
