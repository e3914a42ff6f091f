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
from typing import Literal, NamedTuple

from torch import Tensor

from vit_tucker.tensor.folding import Folds
from vit_tucker.tensor.metric import covariance, mean_metric

Form = Literal["heads", "mean", "none"]


class Needs(NamedTuple):
    """The moments that a conversion reads: what it does not read is not summed.

    Attributes:
        key, value: metrics "heads" by head, their "mean" over heads alone, or "none".
        gradients: second moments of the gradients of queries, keys and values.
        rotations: what it costs to rotate pairs by other angles, on hosts with RoPE.
    """

    key: Form = "heads"
    value: Form = "heads"
    gradients: bool = True
    rotations: bool = True


MEANS = Needs("mean", "mean", gradients=False)
"""What errors cost to first order, without a head's own metrics."""


@dataclass(frozen=True)
class LayerCall:
    """One call of an attention layer, and its probe.

    Attributes:
        x: tokens, (B, N, C).
        y: output of the host, (B, N, O).
        probe: g, (B, N, O).
        attn_mask, is_causal, rope: as the layer got them, position biases in the mask.
        valid: which tokens count, (B, N), boolean: padding doesn't, and its probes are zero. None: all.
    """

    x: Tensor
    y: Tensor
    probe: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False
    rope: Tensor | None = None
    valid: Tensor | None = None

    def part(self, sequences: Tensor | slice) -> "LayerCall":
        """Returns some of the B ``sequences`` (indices or a slice), with their masks."""

        def taken(given: Tensor | None) -> Tensor | None:
            each = given is not None and given.ndim == 4 and given.shape[0] == self.x.shape[0] > 1
            return given[sequences] if each and given is not None else given

        x, y, probe = self.x[sequences], self.y[sequences], self.probe[sequences]
        valid = None if self.valid is None else self.valid[sequences]
        return LayerCall(x, y, probe, taken(self.attn_mask), self.is_causal, taken(self.rope), valid)

    def of_tokens(self, values: Tensor) -> Tensor:
        """Returns the rows of ``values`` (B, N, F) that are of tokens which count, (n, F)."""
        return values.flatten(0, 1) if self.valid is None else values[self.valid]

    @property
    def bytes(self) -> int:
        """Returns the memory of its tokens, outputs and probes; masks and tables are shared by the layers."""
        return sum(part.numel() * part.element_size() for part in (self.x, self.y, self.probe))

    def token_weights(self) -> Tensor:
        """Returns the weight of each token in regressions, |g_n|, (B, N)."""
        return self.probe.norm(dim=-1)


@dataclass(frozen=True)
class Moments:
    """Second moments of one layer's tokens, float64. See the module's formulas; None: not asked for.

    Attributes:
        tokens: number of tokens.
        mean: E[x], (C,).
        query: E[[x, 1] [x, 1]^T], (C + 1, C + 1).
        output: E[g g^T], (O, O).
        key: E[kappa_i kappa_i^T], (H, C, C), with RoPE (H, C + 1, C + 1).
        key_mean: their mean over heads, each scaled to trace 1, (C, C), or (C + 1, C + 1) for keys with a bias.
        key_traces: traces of the key moments of the heads, (H,).
        value: covariance of a_i, weighted by |g|, (H, C, C).
        value_mean: mean of a_i, weighted by |g|, (H, C).
        value_covariance: mean over heads of the covariances, (C, C).
        query_grad: second moment of the gradients with respect to the joined queries, (H*D, H*D).
        kv_grad: the same for joined keys, then values, (2*H*D, 2*H*D).
        rotations: what it costs to rotate a pair by other angles; None also where heads have tables of their own.
    """

    tokens: int
    mean: Tensor
    query: Tensor
    output: Tensor
    key: Tensor | None = None
    key_mean: Tensor | None = None
    key_traces: Tensor | None = None
    value: Tensor | None = None
    value_mean: Tensor | None = None
    value_covariance: Tensor | None = None
    query_grad: Tensor | None = None
    kv_grad: Tensor | None = None
    rotations: Folds | None = None

    @property
    def token_covariance(self) -> Tensor:
        """Returns the covariance of the tokens, (C, C)."""
        return covariance(self.query[:-1, :-1], self.mean)

    def given(self, name: str) -> Tensor:
        """Returns a moment by its name.

        Args:
            name: of the attribute.

        Raises:
            ValueError: it was not summed, since the layer's ``needs`` lack it.
        """
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"the moment '{name}' was not summed: add it to the layer's needs")
        return value

    def key_metric(self, columns: int) -> Tensor:
        """Returns the mean key metric of all heads, each scaled to trace 1 so that none dominates, (columns, columns).

        Args:
            columns: C, or C + 1 for hosts with RoPE whose keys have a bias.
        """
        return self.given("key_mean") if self.key is None else mean_metric(self.key[:, :columns, :columns])

    def value_metric(self, centred: bool = True) -> Tensor:
        """Returns the mean value metric of all heads, (C, C): of covariances, or of raw second moments.

        Args:
            centred: an error in the mean costs nothing, since a bias absorbs it.
        """
        metric, mean = self.given("value_covariance"), self.given("value_mean")
        return metric if centred else metric + mean.mT @ mean / len(mean)
