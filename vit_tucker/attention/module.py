"""The module base of all attention layers, and helpers on Linear layers that the variants share."""

import copy
from abc import abstractmethod
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from vit_tucker.attention.base import HostSpec, MHAWeights
from vit_tucker.attention.moments import Moments
from vit_tucker.attention.sdpa import attend
from vit_tucker.errors import PatchError
from vit_tucker.tensor.metric import Root
from vit_tucker.tensor.ranks import mode_ranks
from vit_tucker.tensor.regression import LinearMoments, ridge_readout
from vit_tucker.tensor.selector import selector_form
from vit_tucker.tensor.tucker import Pairs, Tucker, hosvd


class AttentionModule(nn.Module):
    """Base of all attention layers: timm's call contract and the attributes that timm's tools look for.

    ``forward(x, attn_mask=None, is_causal=False)`` maps (B, N, C) to (B, N, O). A boolean mask is True where attention is
    allowed, any other mask is added to the scores; both broadcast to (B, H, N, N). ``is_causal`` takes precedence.
    """

    def __init__(self, spec: HostSpec) -> None:
        super().__init__()
        self.spec = replace(spec, extras={})
        self.extras = tuple(spec.extras)
        self.num_heads = spec.num_heads
        self.head_dim = spec.head_dim
        self.attn_dim = spec.attn_dim
        self.scale = spec.scale
        self.fused_attn = spec.fused_attn
        self.attn_drop = nn.Dropout(spec.attn_drop)
        self.proj_drop = nn.Dropout(spec.proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """See the class. x (B, N, C) -> (B, N, O)"""
        return self.proj_drop(self.readout(self.mix(x, attn_mask, is_causal)))

    @abstractmethod
    def init_weights(self) -> None:
        """Reset to the method's own random initialisation. timm's init functions call it by this name."""

    @abstractmethod
    def convert_from(self, weights: MHAWeights) -> None:
        """Take over dense attention weights (float64), exactly where the ranks allow; called under no_grad."""

    def convert_calibrated(self, weights: MHAWeights, moments: Moments, damping: float) -> None:
        """Take over dense attention weights so that the error on the tokens is least; called under no_grad.

        Args:
            weights: float64.
            moments: of the layer's tokens, float64.
            damping: of the moments, relative to their mean eigenvalue.
        """
        raise PatchError(f"{type(self).__name__} has no activation-aware conversion; leave calibration out")

    def mix(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """All heads' outputs side by side, before the linear read-out that ends the layer. (B, N, C) -> (B, N, F)"""
        raise PatchError(f"{type(self).__name__} does not say what its linear read-out sees; leave calibration out")

    def readout(self, mixed: Tensor) -> Tensor:
        """What follows ``mix``, dropout apart: linear. (B, N, F) -> (B, N, O)"""
        raise PatchError(f"{type(self).__name__} does not say what its linear read-out is; leave calibration out")

    @property
    def has_out_bias(self) -> bool:
        """Whether the read-out has a bias, which can take up means."""
        return getattr(getattr(self, "proj", None), "bias", None) is not None

    def fit_readout(self, moments: LinearMoments, out_root: Root, damping: float) -> None:
        """Fit what follows ``mix`` to the host's output; called under no_grad.

        Args:
            moments: of f = ``mix(x)`` and y, the host's output.
            out_root: root of the output metric (O, O).
            damping: ridge towards the present read-out, relative to the mean variance of f.
        """

    def input_projections(self) -> list[nn.Linear]:
        """The Linears that read the layer's input x: refinement steps are taken in whitened coordinates there."""
        return []

    def output_projections(self) -> list[nn.Linear]:
        """The Linears that write the layer's output, likewise. Here: ``proj`` if there is one."""
        proj = getattr(self, "proj", None)
        return [proj] if isinstance(proj, nn.Linear) else []

    def folded_out_bias(self) -> Tensor | None:
        """The output bias with the value biases in it, (O,), float64, or None. Here: that of ``proj``."""
        proj = getattr(self, "proj", None)
        return linear_bias(proj) if isinstance(proj, nn.Linear) else None

    def tucker_form(self) -> tuple[Tucker, Tucker]:
        """Exact Tucker decompositions of the pre- and post-softmax tensors, float64. Here: HOSVDs at the numerical ranks."""
        pre, post = self.pre_pairs(), self.post_pairs()
        return hosvd(pre, mode_ranks(pre)), hosvd(post, mode_ranks(post))

    @abstractmethod
    def pre_pairs(self) -> Pairs:
        """The layer's pre-softmax tensor (H, C or C + 1, C): see ``MHAWeights.pre_pairs``."""

    @abstractmethod
    def post_pairs(self) -> Pairs:
        """The layer's post-softmax tensor (H, O, C): see ``MHAWeights.post_pairs``."""


class PerHeadModule(AttentionModule):
    """Base of layers that form each head's query, key and output: norms and gate of the host apply unchanged.

    Attributes:
        num_kv_heads: G, key/value heads.
    """

    num_kv_heads: int
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    gate: nn.Module | None
    proj: nn.Linear

    def add_extras(self, spec: HostSpec, **factory: Any) -> None:
        """Copy the host's q_norm, k_norm, norm and gate (Identity or None where it has none)."""
        modules = {name: module for group in spec.extras.values() for name, module in group.items()}
        for name in ("q_norm", "k_norm", "norm"):
            setattr(self, name, copy.deepcopy(modules[name]) if name in modules else nn.Identity())
        self.gate = copy.deepcopy(modules["gate"]) if "gate" in modules else None
        for name in modules:
            getattr(self, name).to(**factory)

    def readout(self, mixed: Tensor) -> Tensor:
        """See base class."""
        return self.proj(mixed)

    def attend_heads(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Everything between the projections: norms, softmax(QK)V, gate.

        Args:
            x: (B, N, C), the layer's input, for the gate.
            q: (B, H, N, D).
            k, v: (B, G, N, D), G divides H.
            attn_mask, is_causal: as for the layer.

        Returns:
            (B, N, H*D).
        """
        y = attend(
            self.q_norm(q),
            self.k_norm(k),
            v,
            scale=self.scale,
            attn_drop=self.attn_drop,
            fused=self.fused_attn,
            attn_mask=attn_mask,
            is_causal=is_causal,
        )
        y = self.norm(y.transpose(1, 2).flatten(2))  # (B, N, H*D)
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return y

    def fit_readout(self, moments: LinearMoments, out_root: Root, damping: float) -> None:
        """See base class: the output projection, by ridge regression."""
        ff, yf, f_mean, y_mean = moments.centred(self.has_out_bias)
        readout, _ = ridge_readout(ff, yf, linear_weight(self.proj).mT, damping)
        set_linear(self.proj, readout.mT, y_mean - readout @ f_mean)

    @abstractmethod
    def dense_weights(self) -> MHAWeights:
        """Query, key, value and output weights of each of the H heads, float64, and the biases but the key's (it cancels)."""

    def folded_out_bias(self) -> Tensor | None:
        """See base class."""
        return self.dense_weights().folded_out_bias()

    def tucker_form(self) -> tuple[Tucker, Tucker]:
        """See base class; Thms B.2 and B.3: bases are the projections, the core picks columns."""
        weights, group = self.dense_weights(), self.num_heads // self.num_kv_heads
        pre, post = weights.pre_pairs(), weights.post_pairs()
        return (
            selector_form(pre.left, pre.right[::group], self.num_kv_heads),
            selector_form(post.left, post.right[::group], self.num_kv_heads),
        )

    def pre_pairs(self) -> Pairs:
        """See base class."""
        return self.dense_weights().pre_pairs()

    def post_pairs(self) -> Pairs:
        """See base class."""
        return self.dense_weights().post_pairs()


def linear_weight(linear: nn.Linear) -> Tensor:
    """Weight of a Linear as used in ``x @ W``, (in, out), float64, detached."""
    return linear.weight.detach().double().mT


def linear_bias(linear: nn.Linear) -> Tensor | None:
    """Bias of a Linear, (out,), float64, detached, or None."""
    return None if linear.bias is None else linear.bias.detach().double()


def head_bias(linear: nn.Linear, num_heads: int, repeat: int = 1) -> Tensor | None:
    """Bias of a Linear by heads, (num_heads * repeat, D), each head ``repeat`` times in a row; float64, detached, or None."""
    bias = linear_bias(linear)
    return None if bias is None else bias.unflatten(0, (num_heads, -1)).repeat_interleave(repeat, 0)


def set_linear(linear: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> None:
    """Copy ``weight`` (in, out) and ``bias`` (out,) into a Linear; a bias without a value is set to zero."""
    linear.weight.copy_(weight.mT)
    if linear.bias is not None:
        if bias is None:
            linear.bias.zero_()
        else:
            linear.bias.copy_(bias)


def init_linear(linear: nn.Linear, std: float) -> None:
    """Normal weights with standard deviation ``std``, zero bias."""
    nn.init.normal_(linear.weight, std=std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(..., H*D) -> (H, ..., D)"""
    return x.unflatten(-1, (num_heads, -1)).movedim(-2, 0)


def join_heads(x: Tensor) -> Tensor:
    """(H, ..., D) -> (..., H*D)"""
    return x.movedim(0, -2).flatten(-2)
