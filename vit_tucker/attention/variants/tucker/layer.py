"""The layer of Tucker Attention: two Tucker tensors in place of the four projections; all heads share one latent key and value.

    P = x U2 + p0 (N x r2),  K = x U3 (N x r3),  V = x U3t (N x r3t),  T = C x1 U1,  S = Ct x1 U1t
    Q_i = P T_i,  Y_i = softmax(Q_i K^T / sqrt(D)) V,  out = (sum_i Y_i S_i^T) U2t^T + b

p0 is the query bias as the constant coordinate of the query mode; value biases are folded into b; key biases cancel.
With RoPE, Q_i and K are rotated in the latent space of the keys (latent RoPE), where the key bias counts.
Source: Klein et al., Tucker Attention, arXiv 2603.30033, Def 2.1 and Eqs 2-6; Def 3.1 for RoPE.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vit_tucker.attention import contraction
from vit_tucker.attention.backends import AUTO, is_whole, tucker_call
from vit_tucker.attention.backends.base import TuckerCall
from vit_tucker.attention.call import Call
from vit_tucker.attention.contraction import folds, is_plain
from vit_tucker.attention.host import DENSE_INIT_STD, HostSpec, MHAWeights
from vit_tucker.attention.latent_layer import LatentModule
from vit_tucker.attention.linear import augmented_weight, linear_bias, linear_weight, resize_linear, resized, set_linear
from vit_tucker.attention.moments import Moments
from vit_tucker.attention.rope import rotate_key
from vit_tucker.attention.variants.tucker.conversion import TuckerTarget, decompose, decompose_calibrated, refit_post
from vit_tucker.attention.variants.tucker.ranks import has_out_bias, refuse_ranks
from vit_tucker.attention.variants.tucker.resize import resize_tensors
from vit_tucker.tensor.allocation import Ranks
from vit_tucker.tensor.metric import Root
from vit_tucker.tensor.regression import LinearMoments
from vit_tucker.tensor.rotary import RotaryPairs
from vit_tucker.tensor.tucker import Pairs, Tucker, tucker_pairs


class TuckerAttention(LatentModule):
    """Tucker self-attention.

    Args:
        spec: of the host.
        pre, post: ranks of the pre- and of the post-softmax tensor, within their full ranks; the key rank even with RoPE.
        shared_kv: one latent basis for keys and values; then their ranks are equal.
        conversion: from pretrained weights.
        query_bias: keep the host's query bias.
        factory: device, dtype.

    Parameters: pre_core (r1, r2, r3), pre_head (H, r1), q_proj = U2 with the query bias, k_proj = U3; post_core, post_head,
    v_proj = U3t (absent with shared_kv), proj = U2t with the output bias; with RoPE the buffer pair_rotations (r3/2,).
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
        """Ranks, for print(model)."""
        shared = ", shared_kv=True" if self.v_proj is None else ""
        return f"ranks={tuple(self.pre_core.shape)}, post_ranks={tuple(self.post_core.shape)}{shared}"

    def init_weights(self) -> None:
        """Normal factors with columns of unit expected length, cores so that the tensors' entries have the dense init's std.

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

    def run(self, call: Call) -> Tensor:
        """See AttentionModule. Between its projections the layer runs as a whole, unless hooks are to see maps or cores fold into
        the projections."""
        if not self.fused_attn or (not is_whole(self.backend) and self.folds(call.x)):
            return super().run(call)
        return self.proj(self.attend_whole(call))

    def folds(self, x: Tensor) -> bool:
        """Whether a core costs less as a part of the projection beside it, for these tokens."""
        r2, r3, r2t, r3t = self.widths
        heads, spec = self.num_heads, self.spec
        less = folds(x, spec.embed_dim, r2, heads * r3) or folds(x, heads * r3t, r2t, spec.out_dim)
        return less and is_plain(*self.input_projections(), self.proj)

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """r2, r3, r2t and r3t as plain numbers: while torch.fx traces, a parameter's shape is none."""
        values = self.value_projection.out_features
        return self.q_proj.out_features, self.k_proj.out_features, self.proj.in_features, values

    def attend_whole(self, call: Call) -> Tensor:
        """sum_i Y_i S_i^T. -> (B, N, r2t)"""
        p, k, v = self.latents(call.x)
        angles = None
        if self.pair_rotations is not None and self.spec.rope is not None and call.rope is not None:
            k, angles = rotate_key(k, call.rope, self.pair_rotations, self.spec.rope)
        dropout = self.attn_drop.p if self.attn_drop.training else 0.0
        cores = self.pre_heads(), self.post_heads()
        whole = TuckerCall(p, k, v, *cores, call.attn_mask, call.is_causal, self.scale, dropout, angles)
        return tucker_call.attend_whole(whole, self.backend)

    @property
    def heads_backend(self) -> str:
        """See AttentionModule. Where the heads' outputs are asked for, a backend of the whole has no say."""
        return AUTO if is_whole(self.backend) else self.backend

    def pre_heads(self) -> Tensor:
        """T = C x1 U1, (H, r2, r3)"""
        return (self.pre_head @ self.pre_core.flatten(1)).unflatten(1, self.pre_core.shape[1:])

    def post_heads(self) -> Tensor:
        """S = Ct x1 U1t, (H, r2t, r3t)"""
        return (self.post_head @ self.post_core.flatten(1)).unflatten(1, self.post_core.shape[1:])

    def mix(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Tensor | None = None
    ) -> Tensor:
        """See AttentionModule. x (B, N, C) -> Y, (B, N, H*r3t)"""
        B, N, _ = x.shape
        linears = self.input_projections()
        pre = self.pre_heads().transpose(0, 1).flatten(1)  # (r2, H*r3)
        if is_plain(*linears):
            parts = contraction.latent_inputs(
                x, pre, [linear.weight for linear in linears], [linear.bias for linear in linears]
            )
            q, k, v = parts[0], parts[1], parts[len(linears) - 1]
        else:
            q, k, v = self.latents(x)
            q = q @ pre
        q = q.reshape(B, N, self.num_heads, -1).transpose(1, 2)  # (B, H, N, r3), a view
        k, v = k.unsqueeze(1), v.unsqueeze(1)  # (B, 1, N, r3), (B, 1, N, r3t)
        q, k = self.rotate_latent(q, k, rope)
        y = self.attend(q, k, v, attn_mask, is_causal)  # (B, H, N, r3t)
        return y.transpose(1, 2).reshape(B, N, -1)

    def readout(self, mixed: Tensor) -> Tensor:
        """See AttentionModule. Y (B, N, H*r3t) -> (sum_i Y_i S_i^T) U2t^T + b, (B, N, O)"""
        post = self.post_heads().transpose(1, 2).flatten(0, 1)  # (H*r3t, r2t)
        if is_plain(self.proj):
            return contraction.latent_outputs(mixed, post, self.proj.weight, self.proj.bias)
        return self.proj(mixed @ post)

    def convert_from(self, weights: MHAWeights) -> None:
        """HOSVD (App. C.1.4) or HOOI of both weight tensors; exact at full ranks."""
        self.set_tensors(*decompose(self._kept(weights), self._target(), self.conversion))

    def convert_calibrated(self, weights: MHAWeights, moments: Moments, damping: float) -> None:
        """The decompositions with the least error on the tokens, to first order, see ``decompose_calibrated``.

        The read-out that ``fit_readout`` fits afterwards sees all heads' averaged tokens together, each by itself.
        """
        self.set_tensors(*decompose_calibrated(self._kept(weights), self._target(), moments, damping))

    def _kept(self, weights: MHAWeights) -> MHAWeights:
        """The host's weights, without a query bias that the layer has no place for."""
        return weights if self.q_proj.bias is not None else replace(weights, query_bias=None)

    def _target(self) -> TuckerTarget:
        return TuckerTarget(*self.ranks, self.v_proj is None, self.has_out_bias, self.spec.rope)

    def fit_readout(self, moments: LinearMoments, out_root: Root, damping: float) -> None:
        """See base class: output factor, head factor and core of the post-softmax tensor, by reduced-rank regression."""
        post, out_bias = refit_post(self.tucker_form()[1], moments, self.has_out_bias, out_root, damping)
        set_linear(self.proj, post.left.mT, out_bias)
        self.post_head.copy_(post.head)
        self.post_core.copy_(post.core)

    @property
    def latent_projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear | None]:
        """The Linears of U2, U3 and U3t."""
        return self.q_proj, self.k_proj, self.v_proj

    def tucker_form(self) -> tuple[Tucker, Tucker]:
        """See base class: the layer's own parameters; one key/value factor with shared_kv. A query bias left out is zero."""
        query, (key, value) = augmented_weight(self.q_proj), self.latent_bases()
        if self.spec.qkv_bias and self.q_proj.bias is None:
            query = torch.cat([query, torch.zeros_like(query[:1])])
        pre_head, pre_core, post_head, post_core = (
            p.detach().double() for p in (self.pre_head, self.pre_core, self.post_head, self.post_core)
        )
        return Tucker(pre_core, pre_head, query, key), Tucker(post_core, post_head, linear_weight(self.proj).mT, value)

    @property
    def ranks(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Ranks of the pre- and of the post-softmax tensor."""
        return tuple(self.pre_core.shape), tuple(self.post_core.shape)  # type: ignore[return-value]

    def factors(self) -> dict[str, Tensor]:
        """See base class: core, head, left and right of "pre" and "post", as in "pre.core"; one right factor with shared_kv."""
        pre = (self.pre_core, self.pre_head, self.q_proj.weight, self.k_proj.weight)
        post = (self.post_core, self.post_head, self.proj.weight, self.value_projection.weight)
        return {f"{tensor}.{role}": factor for tensor, factors in (("pre", pre), ("post", post))
                for role, factor in zip(Tucker._fields, factors, strict=True)}  # fmt: skip

    def rank_options(self) -> dict[str, Any]:
        """See base class."""
        return dict(zip(("ranks", "post_ranks"), self.ranks, strict=True))

    def _resize(self, **options: Any) -> None:
        """See base class."""
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
        """Copy two Tucker decompositions in, see ``TuckerTensors``.

        Args:
            pre, post: the pre- and the post-softmax tensor.
            out_bias: (O,) or None.
            rotations: of the latent pairs, (r3/2,), with RoPE.
        """
        for linear, factor in ((self.q_proj, pre.left), (self.k_proj, pre.right)):
            width = linear.in_features
            set_linear(linear, factor[:width], factor[width] if factor.shape[0] > width else None)
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
        """See base class."""
        bias, key_bias = linear_bias(self.proj), linear_bias(self.k_proj)
        if bias is None or self.v_proj is not None or key_bias is None:
            return bias
        return bias + constant_output(self.tucker_form()[1], key_bias)

    def pre_pairs(self) -> Pairs:
        """See base class; pairs of width r2: left U2, right U3 T_i^T."""
        pre = self.tucker_form()[0]
        return tucker_pairs(pre._replace(right=pre.right[: self.k_proj.in_features]))

    def rotary_pairs(self) -> RotaryPairs:
        """See base class; pairs of width r3: left U2 T_i, right U3."""
        if self.pair_rotations is None:
            return super().rotary_pairs()
        core, head, left, right = self.tucker_form()[0]
        return self.shared_rotary_pairs(left @ torch.tensordot(head, core, 1), right)

    def post_pairs(self) -> Pairs:
        """See base class; pairs of width r2t: left U2t, right U3t S_i^T."""
        return tucker_pairs(self.tucker_form()[1])


def constant_output(post: Tucker, value: Tensor) -> Tensor:
    """Output of values that are the same for all tokens: U2t sum_i S_i v. (R3,) -> (O,)"""
    return post.left @ (torch.tensordot(post.head, post.core, 1).sum(0) @ value)
