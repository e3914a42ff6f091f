"""The base of attention layers that form each head's query, key and output: what a host does head by head applies to them."""

import copy
from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from vit_tucker.attention import rope as rotary
from vit_tucker.attention.backends import heads
from vit_tucker.attention.host import HostSpec, MHAWeights
from vit_tucker.attention.linear import linear_weight, set_linear
from vit_tucker.attention.module import AttentionModule
from vit_tucker.errors import PatchError
from vit_tucker.tensor.metric import Root
from vit_tucker.tensor.regression import LinearMoments, ridge_readout
from vit_tucker.tensor.rotary import RotaryPairs
from vit_tucker.tensor.selector import selector_form
from vit_tucker.tensor.tucker import Pairs, Tucker


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
        """Copies the host's q_norm, k_norm, norm and gate (Identity or None where it has none).

        Args:
            spec: the host.
            **factory: ``device`` and ``dtype`` of the copies.
        """
        modules = {name: module for key in self.extras for name, module in spec.extras[key].items()}
        for name in ("q_norm", "k_norm", "norm"):
            setattr(self, name, copy.deepcopy(modules[name]) if name in modules else nn.Identity())
        self.gate = copy.deepcopy(modules["gate"]) if "gate" in modules else None
        for name in modules:
            getattr(self, name).to(**factory)

    @property
    def kv_width(self) -> int | None:
        """Returns the numbers per token in a KV cache: each key/value head's key and value, 2 G D."""
        return 2 * self.num_kv_heads * self.head_dim

    def readout(self, mixed: Tensor) -> Tensor:
        """Applies the output projection to ``mixed`` (B, N, H*D), which gives (B, N, O)."""
        return self.proj(mixed)

    def rotate_heads(self, q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalises and rotates queries and keys as the host does.

        Args:
            q: (B, H, N, D) queries.
            k, v: (B, G, N, D) keys and values, G divides H.
            rope: (N', 2 D) or (B, N', 2 D) table of the call.

        Returns:
            Queries, keys and values; as many keys as queries where each head has angles of its own.
        """
        q, k = self.q_norm(q), self.k_norm(k)
        if self.spec.rope is not None:
            if self.spec.rope.per_head:  # heads that share a key rotate it each by its own angles
                k, v = heads.expand_heads(k, self.num_heads), heads.expand_heads(v, self.num_heads)
            q, k = (rotary.rotate_heads(part, rope, self.spec.rope).type_as(v) for part in (q, k))
        return q, k, v

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        """Applies the host's norm and gate to the heads' outputs, which gives (B, N, H*D).

        Args:
            x: (B, N, C) tokens, which the gate reads.
            y: (B, H, N, D) heads' outputs.
        """
        y = self.norm(y.transpose(1, 2).flatten(2))
        return y if self.gate is None else y * self.gate(x).sigmoid()

    def fit_readout(self, moments: LinearMoments, out_root: Root, damping: float) -> None:
        """Fits the output projection by ridge regression."""
        ff, yf, f_mean, y_mean = moments.centred(self.has_out_bias)
        readout, _ = ridge_readout(ff, yf, linear_weight(self.proj).mT, damping)
        set_linear(self.proj, readout.mT, y_mean - readout @ f_mean)

    @abstractmethod
    def dense_weights(self) -> MHAWeights:
        """Returns query, key, value and output weights of all H heads and their biases, float64.

        A key bias is returned only where it does not cancel.
        """

    def rotary_pairs(self) -> RotaryPairs:
        """Returns the pre-softmax tensor with its rotations, see ``MHAWeights.rotary_pairs``; raises PatchError without RoPE."""
        if self.spec.rope is None:
            raise PatchError(f"{type(self).__name__} has no RoPE here")
        return self.dense_weights().rotary_pairs(self.spec.rope)

    def folded_out_bias(self) -> Tensor | None:
        """Returns the output bias with the value biases in it, (O,), float64, or None."""
        return self.dense_weights().folded_out_bias()

    def tucker_form(self) -> tuple[Tucker, Tucker]:
        """Returns the projections as bases and cores that pick columns (Thms B.2 and B.3)."""
        weights, group = self.dense_weights(), self.num_heads // self.num_kv_heads
        pre, post = weights.pre_tensor(self.spec.rope), weights.post_pairs()
        keys = pre.right[:: self._heads_per_key]
        return (
            selector_form(pre.left, keys, len(keys), keep_columns=self.spec.rope is not None),
            selector_form(post.left, post.right[::group], self.num_kv_heads),
        )

    @property
    def _heads_per_key(self) -> int:
        """Returns how many heads have the same key, rotated: where each rotates by angles of its own, one."""
        mixed = self.spec.rope is not None and self.spec.rope.per_head
        return 1 if mixed else self.num_heads // self.num_kv_heads

    def latent_rotations(self) -> Tensor:
        """Returns the numbers of the rotations of each key's pairs, one key after the other."""
        return self.rotary_pairs().rotations[:: self._heads_per_key].flatten()

    def pre_pairs(self) -> Pairs:
        """Returns the pre-softmax tensor, see ``MHAWeights.pre_pairs``."""
        return self.dense_weights().pre_pairs()

    def post_pairs(self) -> Pairs:
        """Returns the post-softmax tensor, see ``MHAWeights.post_pairs``."""
        return self.dense_weights().post_pairs()
