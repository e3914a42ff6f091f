"""The parameters of Tucker Attention: built, read and written as two Tucker tensors.

    pre-softmax tensor:  pre_core (r1, r2, r3), pre_head (H, r1), q_proj = U2 with the query bias, k_proj = U3
    post-softmax tensor: post_core, post_head, proj = U2t with the output bias, v_proj = U3t (absent with shared_kv)

Source: Klein et al., Tucker Attention, arXiv 2603.30033, Def 2.1.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vit_tucker.attention.host import DENSE_INIT_STD, HostSpec, MHAWeights
from vit_tucker.attention.latent_layer import LatentModule
from vit_tucker.attention.linear import (
    augmented_weight,
    linear_bias,
    linear_weight,
    resize_linear,
    resized,
    set_augmented,
    set_linear,
)
from vit_tucker.attention.moments import Moments, Needs
from vit_tucker.attention.variants.tucker.conversion import TuckerTarget, decompose, decompose_calibrated, refit_post
from vit_tucker.attention.variants.tucker.ranks import has_out_bias, refuse_ranks
from vit_tucker.attention.variants.tucker.resize import resize_tensors
from vit_tucker.tensor.allocation import Ranks
from vit_tucker.tensor.metric import Root
from vit_tucker.tensor.regression import LinearMoments
from vit_tucker.tensor.resize import Resized, orthonormal, orthonormal_tucker
from vit_tucker.tensor.rotary import RotaryPairs
from vit_tucker.tensor.tucker import Pairs, Tucker, tucker_pairs


class TuckerFactors(LatentModule):
    """Base of the Tucker layer: its parameters.

    Args:
        spec: of the host.
        pre, post: ranks of the pre- and of the post-softmax tensor, within their full ranks; the key rank even with RoPE.
        shared_kv: one latent basis for keys and values; then their ranks are equal.
        conversion: from pretrained weights.
        query_bias: keep the host's query bias.
        factory: device, dtype.
    """

    def __init__(
        self,
        spec: HostSpec,
        pre: Ranks,
        post: Ranks,
        *,
        shared_kv: bool = False,
        conversion: Literal["hosvd", "hooi"] = "hosvd",
        query_bias: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__(spec)
        self.conversion = conversion
        self.pre_head = nn.Parameter(torch.empty(spec.num_heads, pre[0], **factory))
        self.pre_core = nn.Parameter(torch.empty(pre, **factory))
        self.q_proj = nn.Linear(spec.embed_dim, pre[1], bias=spec.qkv_bias and query_bias, **factory)
        self.k_proj = nn.Linear(spec.embed_dim, pre[2], bias=spec.latent_key_bias, **factory)
        self.add_rotations(spec, pre[2], **factory)
        self.v_proj = None if shared_kv else nn.Linear(spec.embed_dim, post[2], bias=False, **factory)
        self.post_head = nn.Parameter(torch.empty(spec.num_heads, post[0], **factory))
        self.post_core = nn.Parameter(torch.empty(post, **factory))
        self.proj = nn.Linear(post[1], spec.out_dim, bias=has_out_bias(spec), **factory)
        self.init_weights()

    def extra_repr(self) -> str:
        """Returns the ranks, for print(model)."""
        shared = ", shared_kv=True" if self.v_proj is None else ""
        return f"ranks={tuple(self.pre_core.shape)}, post_ranks={tuple(self.post_core.shape)}{shared}"

    def init_weights(self) -> None:
        """Draws normal factors with columns of unit expected length; the tensors' entries have the dense init's std.

        A dense init with standard deviation s gives W_i = WQ_i WK_i^T entries of standard deviation sqrt(D) s^2; independent
        factors and core multiply variances, times r1 r2 r3.
        """
        target = self.head_dim**0.5 * DENSE_INIT_STD**2
        for linear in self.input_projections():
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.normal_(self.proj.weight, std=self.proj.out_features**-0.5)
        self.init_rotations()
        for linear in (self.q_proj, self.k_proj, self.proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for head, core, width in (
            (self.pre_head, self.pre_core, self.q_proj.in_features),
            (self.post_head, self.post_core, self.proj.out_features),
        ):
            nn.init.normal_(head, std=self.num_heads**-0.5)
            spread = (self.num_heads * width * self.k_proj.in_features) ** -0.5  # product of the three factors' std
            nn.init.normal_(core, std=target / (spread * core.numel() ** 0.5))

    def convert_from(self, weights: MHAWeights) -> None:
        """Converts by HOSVD (App. C.1.4) or HOOI of both weight tensors; exact at full ranks."""
        self.set_tensors(*decompose(self._kept(weights), self._target(), self.conversion))

    def convert_calibrated(self, weights: MHAWeights, moments: Moments, damping: float) -> None:
        """Converts with the least error on the tokens, to first order, see ``decompose_calibrated``.

        The read-out that ``fit_readout`` fits afterwards sees all heads' averaged tokens together, each by itself.
        """
        self.set_tensors(*decompose_calibrated(self._kept(weights), self._target(), moments, damping))

    @property
    def needs(self) -> Needs:
        """Returns the moments read: key metrics of each head only where no rotation ties the heads to one latent."""
        return Needs("heads" if self.spec.rope is None else "mean", "mean", gradients=False)

    def _kept(self, weights: MHAWeights) -> MHAWeights:
        """Returns the host's weights, without a query bias that the layer has no place for."""
        return weights if self.q_proj.bias is not None else replace(weights, query_bias=None)

    def _target(self) -> TuckerTarget:
        return TuckerTarget(*self.ranks, self.v_proj is None, self.has_out_bias, self.spec.rope)

    def fit_readout(self, moments: LinearMoments, out_root: Root, damping: float) -> None:
        """Fits output factor, head factor and core of the post-softmax tensor, by reduced-rank regression."""
        post, out_bias = refit_post(self.tucker_form()[1], moments, self.has_out_bias, out_root, damping)
        set_linear(self.proj, post.left.mT, out_bias)
        self.post_head.copy_(post.head)
        self.post_core.copy_(post.core)

    def orthonormalise(self) -> None:
        """Rewrites all factors with orthonormal columns, as after a HOSVD; columns that rotate in pairs get unit length."""
        (pre, post), out_bias = self.tucker_form(), self.folded_out_bias()
        key, value = orthonormal(pre.right, self.pair_rotations is not None), orthonormal(post.right)
        if self.v_proj is None:  # one basis, perhaps with the key bias as a last row
            value = Resized(key.factor[: len(post.right)], key.map)
        self.set_tensors(orthonormal_tucker(pre, key), orthonormal_tucker(post, value), out_bias)

    @property
    def latent_projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear | None]:
        """Returns the Linears of U2, U3 and U3t."""
        return self.q_proj, self.k_proj, self.v_proj

    def tucker_form(self) -> tuple[Tucker, Tucker]:
        """Returns the layer's own parameters; one key/value factor with shared_kv. A query bias left out is zero."""
        query, (key, value) = augmented_weight(self.q_proj), self.latent_bases()
        if self.spec.qkv_bias and self.q_proj.bias is None:
            query = torch.cat([query, torch.zeros_like(query[:1])])
        pre_head, pre_core, post_head, post_core = (
            p.detach().double() for p in (self.pre_head, self.pre_core, self.post_head, self.post_core)
        )
        return Tucker(pre_core, pre_head, query, key), Tucker(post_core, post_head, linear_weight(self.proj).mT, value)

    @property
    def ranks(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Returns the ranks of the pre- and of the post-softmax tensor."""
        return tuple(self.pre_core.shape), tuple(self.post_core.shape)  # type: ignore[return-value]

    def factors(self) -> dict[str, Tensor]:
        """Returns core, head, left and right of "pre" and "post", as in "pre.core"; one right factor with shared_kv."""
        pre = (self.pre_core, self.pre_head, self.q_proj.weight, self.k_proj.weight)
        post = (self.post_core, self.post_head, self.proj.weight, self.value_projection.weight)
        return {f"{tensor}.{role}": factor for tensor, factors in (("pre", pre), ("post", post))
                for role, factor in zip(Tucker._fields, factors, strict=True)}  # fmt: skip

    def rank_options(self) -> dict[str, Any]:
        """Returns the present ranks and post_ranks."""
        return dict(zip(("ranks", "post_ranks"), self.ranks, strict=True))

    def _resize(self, **options: Any) -> None:
        ranks, post_ranks = tuple(options["ranks"]), tuple(options["post_ranks"])
        refuse_ranks(self.spec, ranks, post_ranks, self.v_proj is None, self.q_proj.bias is not None)
        out_bias = self.folded_out_bias()
        (pre, post), rotations = resize_tensors(
            self.tucker_form(), (ranks, post_ranks), self.pair_rotations, self.spec, self.v_proj is None
        )
        width = self.k_proj.in_features
        for linear, rank in zip(self.input_projections(), (*ranks[1:], post_ranks[2]), strict=False):
            resize_linear(linear, width, rank)
        resize_linear(self.proj, post_ranks[1], self.proj.out_features)
        self.pre_core, self.post_core = resized(self.pre_core, ranks), resized(self.post_core, post_ranks)
        self.pre_head = resized(self.pre_head, (self.num_heads, ranks[0]))
        self.post_head = resized(self.post_head, (self.num_heads, post_ranks[0]))
        self.pair_rotations = rotations
        self.set_tensors(pre, post, out_bias)

    def set_tensors(self, pre: Tucker, post: Tucker, out_bias: Tensor | None, rotations: Tensor | None = None) -> None:
        """Copies two Tucker decompositions into the parameters.

        Args:
            pre, post: the decompositions, see ``TuckerTensors``.
            out_bias: (O,) or None.
            rotations: (R3/2,), see ``TuckerTensors``; None leaves those of the layer.
        """
        set_augmented(self.q_proj, pre.left)
        set_augmented(self.k_proj, pre.right)
        if self.v_proj is not None:
            set_linear(self.v_proj, post.right)
        elif self.k_proj.bias is not None and out_bias is not None:  # values that share the keys' bias: a constant
            out_bias = out_bias - constant_output(post, pre.right[-1])
        set_linear(self.proj, post.left.mT, out_bias)
        for tensor, core, head in ((pre, self.pre_core, self.pre_head), (post, self.post_core, self.post_head)):
            core.copy_(tensor.core)
            head.copy_(tensor.head)
        if self.pair_rotations is not None and rotations is not None:
            self.pair_rotations.copy_(rotations)

    def folded_out_bias(self) -> Tensor | None:
        """Returns the output bias with what a shared key bias adds to the values, (O,), float64, or None."""
        bias, key_bias = linear_bias(self.proj), linear_bias(self.k_proj)
        if bias is None or self.v_proj is not None or key_bias is None:
            return bias
        return bias + constant_output(self.tucker_form()[1], key_bias)

    def pre_pairs(self) -> Pairs:
        """Returns pairs of width r2: left U2, right U3 T_i^T."""
        pre = self.tucker_form()[0]
        return tucker_pairs(pre._replace(right=pre.right[: self.k_proj.in_features]))

    def rotary_pairs(self) -> RotaryPairs:
        """Returns pairs of width r3: left U2 T_i, right U3."""
        if self.pair_rotations is None:
            return super().rotary_pairs()
        core, head, left, right = self.tucker_form()[0]
        return self.shared_rotary_pairs(left @ torch.tensordot(head, core, 1), right)

    def post_pairs(self) -> Pairs:
        """Returns pairs of width r2t: left U2t, right U3t S_i^T."""
        return tucker_pairs(self.tucker_form()[1])


def constant_output(post: Tucker, value: Tensor) -> Tensor:
    """Returns the output (O,) of values that are the same for all tokens: U2t sum_i S_i v.

    Args:
        post: the post-softmax tensor.
        value: v, (R3,).
    """
    return post.left @ (torch.tensordot(post.head, post.core, 1).sum(0) @ value)
