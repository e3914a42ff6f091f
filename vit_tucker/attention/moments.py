"""Sums second moments of a layer's tokens, in the form that activation-aware conversions need.

The error of a layer is measured on its tokens x_n by probes g_n, vectors in the space of the layer's output: E (g_n . dy_n)^2.
A probe of random noise measures the layer's own output; the gradient of a random combination of the model's final features
measures what the error does to them. To first order, with p the softmax rows and a_in = sum_l p_i(n,l) x_l,

    dy from dWt:  g_n^T sum_i dWt_i^T a_in            metrics: output E[g g^T], value Cov[a_i], head by head
    dy from dW:   x~_n^T sum_i dW_i kappa_in          metrics: query E[x~ x~^T] with x~ = [x, 1], key E[kappa_i kappa_i^T]
    kappa_in = sum_l s_i(n,l) x_l,   s = p * (g^T Wt_i^T x_l - its mean under p): the gradient of the scores

kappa does not change when all keys are shifted, as the softmax does not; heads with little influence have small kappa. With RoPE
there is a kappa for each rotation, sum_l s_i(n,l) exp(-i angle(l)) x~_l, and the key metric is their mean, weighted by how much a
rotation matters: sum_n kappa kappa^* = sum_{l,m} (s^T s)_lm c_lm x~_l x~_m^T, with c_lm the weighted mean of
cos(angle(l) - angle(m)). Shifts don't cancel any more, hence x~ = [x, 1].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vit_tucker.attention.backends.masks import masked_softmax
from vit_tucker.attention.host import HostSpec, MHAWeights
from vit_tucker.attention.rope import angle_kernel, rotate_heads
from vit_tucker.tensor.metric import covariance
from vit_tucker.tensor.rotary import pair_shares

CONSTANT = 1e-11
"""Variance of the tokens over their squared mean below which they count as constant: float32 rounding is 1e-14."""


@dataclass(frozen=True)
class LayerCall:
    """One call of an attention layer, and its probe.

    Attributes:
        x: tokens, (B, N, C).
        y: output of the host, (B, N, O).
        probe: g, (B, N, O).
        attn_mask, is_causal, rope: as the layer got them, position biases in the mask.
    """

    x: Tensor
    y: Tensor
    probe: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False
    rope: Tensor | None = None

    def part(self, sequences: Tensor | slice) -> "LayerCall":
        """Returns some of the B ``sequences`` (indices or a slice), with their masks."""

        def taken(given: Tensor | None) -> Tensor | None:
            each = given is not None and given.ndim == 4 and given.shape[0] == self.x.shape[0] > 1
            return given[sequences] if each and given is not None else given

        x, y, probe = self.x[sequences], self.y[sequences], self.probe[sequences]
        return LayerCall(x, y, probe, taken(self.attn_mask), self.is_causal, taken(self.rope))

    def token_weights(self) -> Tensor:
        """Returns the weight of each token in regressions, |g_n|, (B, N)."""
        return self.probe.norm(dim=-1)


@dataclass(frozen=True)
class Moments:
    """Second moments of one layer's tokens, float64. See the module's formulas.

    Attributes:
        tokens: number of tokens.
        mean: E[x], (C,).
        query: E[[x, 1] [x, 1]^T], (C + 1, C + 1).
        key: E[kappa_i kappa_i^T], (H, C, C), with RoPE (H, C + 1, C + 1).
        value: covariance of a_i, weighted by |g|, (H, C, C).
        value_mean: mean of a_i, weighted by |g|, (H, C).
        output: E[g g^T], (O, O).
        query_grad: second moment of the gradients with respect to the joined queries, (H*D, H*D).
        kv_grad: the same for joined keys, then values, (2*H*D, 2*H*D).
    """

    tokens: int
    mean: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    value_mean: Tensor
    output: Tensor
    query_grad: Tensor
    kv_grad: Tensor

    @property
    def token_covariance(self) -> Tensor:
        """Returns the covariance of the tokens, (C, C)."""
        return covariance(self.query[:-1, :-1], self.mean)

    @staticmethod
    def bytes(spec: HostSpec) -> int:
        """Returns the memory of one layer's moments in bytes, for a host of shape ``spec``."""
        c, hd = spec.embed_dim, spec.attn_dim
        return 8 * ((c + 1) ** 2 + 2 * spec.num_heads * c * c + spec.out_dim**2 + 5 * hd * hd)


class MomentSums:
    """Running sums behind ``Moments``. Products in the tokens' dtype (at least float32), sums in float64."""

    def __init__(self, spec: HostSpec, weights: MHAWeights) -> None:
        self.spec = spec
        like = weights.query
        self.dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.weights = weights.to(self.dtype)
        heads, c, out, hd = spec.num_heads, spec.embed_dim, spec.out_dim, spec.attn_dim
        key = c if spec.rope is None else c + 1
        shapes = {"query": (c + 1, c + 1), "key": (heads, key, key), "value": (heads, c, c), "value_mean": (heads, c),
                  "output": (out, out), "query_grad": (hd, hd), "kv_grad": (2 * hd, 2 * hd)}  # fmt: skip
        self.sums = {name: torch.zeros(s, dtype=torch.float64, device=like.device) for name, s in shapes.items()}
        self.weight_sum = torch.zeros((), dtype=torch.float64, device=like.device)
        self.spread = torch.zeros((), dtype=torch.float64, device=like.device)
        self.tokens = 0
        self.shift: Tensor | None = None
        self.rotation_weights = torch.empty(0)
        if spec.rope is not None:
            self.rotation_weights = pair_shares(self.weights.rotary_pairs(spec.rope))

    def add(self, call: LayerCall) -> None:
        """Adds one ``call``, in slices of the batch, so that the attention maps stay small."""
        slices = max(1, int(call.x.shape[0] * self.spec.num_heads * call.x.shape[1] ** 2 / 2**25))
        for part in torch.arange(call.x.shape[0], device=call.x.device).chunk(slices):
            self._add(call.part(part))

    def _add(self, call: LayerCall) -> None:
        x, probe = call.x.to(self.dtype), call.probe.to(self.dtype)
        w, spec = self.weights, self.spec
        if self.shift is None:
            self.shift = x.mean((0, 1))  # sums of squares of shifted tokens: large means don't eat the digits
        centred = x - self.shift
        p, q, k = host_attention(x, w, spec, call.attn_mask, call.is_causal, call.rope)
        v = heads_of(centred, w.value)  # (B, H, N, D); the shift passes through the softmax unchanged
        probe_v = torch.einsum("bno,hdo->bhnd", probe, w.out)  # gradient of the head's averaged value
        s = probe_v @ v.mT
        s = p * (s - (p * s).sum(-1, keepdim=True))  # gradient of the scores
        key_sums = self._key_sums(s, centred, call.rope)
        averaged = p @ centred.unsqueeze(1)
        token_weights = probe.norm(dim=-1)  # (B, N)
        ones = torch.cat([x, torch.ones_like(x[..., :1])], -1).flatten(0, 1)
        flat_probe = probe.flatten(0, 1)
        grad_q, grad_k = s @ k * spec.scale, s.mT @ q * spec.scale
        if spec.rope is not None:
            grad_q, grad_k = (rotate_heads(g, call.rope, spec.rope, inverse=True) for g in (grad_q, grad_k))
        grad_kv = torch.cat([joined(grad_k), joined(p.mT @ probe_v)], -1)
        sums = self.sums
        sums["query"] += ones.mT @ ones
        sums["output"] += flat_probe.mT @ flat_probe
        sums["query_grad"] += joined(grad_q).mT @ joined(grad_q)
        sums["kv_grad"] += grad_kv.mT @ grad_kv
        sums["key"] += key_sums
        for head in range(spec.num_heads):
            avg = averaged[:, head].flatten(0, 1)
            weighted = avg * token_weights.flatten().unsqueeze(1)
            sums["value"][head] += weighted.mT @ avg
            sums["value_mean"][head] += weighted.sum(0)
        self.weight_sum += token_weights.sum()
        self.spread += centred.square().sum()
        self.tokens += len(ones)

    def _key_sums(self, s: Tensor, centred: Tensor, rope: Tensor | None) -> Tensor:
        """Returns sums of kappa kappa^T, (H, C, C), with RoPE (H, C + 1, C + 1) for the tokens [x - shift, 1].

        s is the gradient of the scores, (B, H, N, N), centred x - shift, (B, N, C), rope the call's table.
        """
        if self.spec.rope is None:
            kappa = s @ centred.unsqueeze(1)  # (B, H, N, C)
            return torch.stack([kap.mT @ kap for kap in kappa.transpose(0, 1).flatten(1, 2)])
        tokens = torch.cat([centred, torch.ones_like(centred[..., :1])], -1)  # (B, N, C + 1)
        weighted = s.mT @ s
        if rope is not None:
            weighted = weighted * angle_kernel(rope, self.spec.rope, self.rotation_weights, s.shape[-1])
        return torch.stack(
            [tokens.flatten(0, 1).mT @ (part @ tokens).flatten(0, 1) for part in weighted.transpose(0, 1)]
        )

    def _key_moments(self, mean_of_shift: Tensor) -> Tensor:
        """Returns key moments in the coordinates of the tokens: [x, 1] instead of [x - shift, 1]."""
        key = self.sums["key"] / self.tokens
        if self.spec.rope is None:
            return key
        change = torch.eye(key.shape[-1], dtype=key.dtype, device=key.device)
        change[:-1, -1] = mean_of_shift
        return change @ key @ change.mT

    def moments(self) -> Moments:
        """Returns the means of all calls so far.

        Raises:
            ValueError: no tokens, values that are not finite, or probes that are all zero.
        """
        if self.tokens == 0 or self.shift is None:
            raise ValueError("no tokens reached the layer")
        if not all(torch.isfinite(value).all() for value in self.sums.values()):
            raise ValueError("the tokens or their gradients are not finite")
        mean = self.sums["query"][-1, :-1] / self.tokens
        variance = self.spread / self.tokens - (mean - self.shift).square().sum()
        if variance <= CONSTANT * mean.square().sum():
            raise ValueError("all tokens are the same: the inputs are constant")
        if not self.weight_sum > 0:
            raise ValueError("the layer's output has no influence on the model's features")
        per_token = {name: self.sums[name] / self.tokens for name in ("query", "output", "query_grad", "kv_grad")}
        shifted_mean = self.sums["value_mean"] / self.weight_sum
        return Moments(
            tokens=self.tokens,
            mean=per_token["query"][-1, :-1],
            key=self._key_moments(self.shift.double()),
            value=covariance(self.sums["value"] / self.weight_sum, shifted_mean),
            value_mean=shifted_mean + self.shift.double(),
            **per_token,
        )


def host_attention(
    x: Tensor, weights: MHAWeights, spec: HostSpec, attn_mask: Tensor | None, is_causal: bool,
    rope: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the softmax rows (B, H, N, N), queries and keys (B, H, N, D) of a host with these ``weights`` and ``spec``.

    Arguments as of ``AttentionModule.forward``.
    """
    q = heads_of(x, weights.query, weights.query_bias)
    k = heads_of(x, weights.key, weights.key_bias)
    norms = spec.extras.get("qk_norm", {})
    if norms:
        dtype = next((p.dtype for norm in norms.values() for p in norm.parameters()), q.dtype)
        q, k = norms["q_norm"](q.to(dtype)).to(q.dtype), norms["k_norm"](k.to(dtype)).to(k.dtype)
    if spec.rope is not None:
        q, k = rotate_heads(q, rope, spec.rope), rotate_heads(k, rope, spec.rope)
    return masked_softmax(q * spec.scale @ k.mT, attn_mask, is_causal), q, k


def heads_of(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns the projection of tokens to heads, (B, H, N, D).

    Args:
        x, weight, bias: (B, N, C), (H, C, D) and (H, D) or None.
    """
    y = torch.einsum("bnc,hcd->bhnd", x, weight)
    return y if bias is None else y + bias[:, None]


def joined(x: Tensor) -> Tensor:
    """Reshapes (B, H, N, D) to (B*N, H*D)."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)
