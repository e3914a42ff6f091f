"""The layer of Tucker Attention: two Tucker tensors in place of the four projections; all heads share one latent key and value.

    P = x U2 + p0 (N x r2),  K = x U3 (N x r3),  V = x U3t (N x r3t),  T = C x1 U1,  S = Ct x1 U1t
    Q_i = P T_i,  Y_i = softmax(Q_i K^T / sqrt(D)) V,  out = (sum_i Y_i S_i^T) U2t^T + b

p0 is the query bias as the constant coordinate of the query mode; value biases are folded into b; key biases cancel.
With RoPE, Q_i and K are rotated in the latent space of the keys (latent RoPE), where the key bias counts.
Source: Klein et al., Tucker Attention, arXiv 2603.30033, Def 2.1 and Eqs 2-6; Def 3.1 for RoPE.
"""

from torch import Tensor

from vit_tucker.attention import cores
from vit_tucker.attention import rope as rotary
from vit_tucker.attention.backends import AUTO, is_whole, tucker_call
from vit_tucker.attention.backends.base import TuckerCall
from vit_tucker.attention.call import Call
from vit_tucker.attention.contraction import folds, is_plain
from vit_tucker.attention.variants.tucker.factors import TuckerFactors


class TuckerAttention(TuckerFactors):
    """Tucker self-attention, computed as a whole or head by head; for its arguments and parameters see ``TuckerFactors``."""

    def run(self, call: Call) -> Tensor:
        """Computes the output (B, N, O) of a ``call``, all between the projections as a whole.

        The parts are computed one by one where hooks are to see maps, or where cores fold into the projections.
        """
        if not self.fused_attn or (not is_whole(self.backend) and self.folds(call.x)):
            return super().run(call)
        return self.proj(self.attend_whole(call))

    def folds(self, x: Tensor) -> bool:
        """Returns whether a core costs less as a part of the projection beside it, for tokens ``x`` (B, N, C)."""
        r2, r3, r2t, r3t = self.widths
        heads, spec = self.num_heads, self.spec
        less = folds(x, spec.embed_dim, r2, heads * r3) or folds(x, heads * r3t, r2t, spec.out_dim)
        return less and is_plain(*self.input_projections(), self.proj)

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Returns r2, r3, r2t and r3t as plain numbers: while torch.fx traces, a parameter's shape is none."""
        values = self.value_projection.out_features
        return self.q_proj.out_features, self.k_proj.out_features, self.proj.in_features, values

    def attend_whole(self, call: Call) -> Tensor:
        """Returns sum_i Y_i S_i^T, (B, N, r2t)."""
        p, k, v = self.latents(call.x)
        angles = None
        if self.pair_rotations is not None and self.spec.rope is not None and call.rope is not None:
            k, angles = rotary.rotate_key(k, call.rope, self.pair_rotations, self.spec.rope)
        dropout = self.attn_drop.p if self.attn_drop.training else 0.0
        cores = self.pre_heads(), self.post_heads()
        whole = TuckerCall(p, k, v, *cores, call.attn_mask, call.is_causal, self.scale, dropout, angles)
        return tucker_call.attend_whole(whole, self.backend)

    @property
    def heads_backend(self) -> str:
        """Returns the backend for queries, keys and values of heads, "auto" where the layer's own takes none."""
        return AUTO if is_whole(self.backend) else self.backend

    def pre_heads(self) -> Tensor:
        """Returns T = C x1 U1, (H, r2, r3)."""
        return (self.pre_head @ self.pre_core.flatten(1)).unflatten(1, self.pre_core.shape[1:])

    def post_heads(self) -> Tensor:
        """Returns S = Ct x1 U1t, (H, r2t, r3t)."""
        return (self.post_head @ self.post_core.flatten(1)).unflatten(1, self.post_core.shape[1:])

    def project(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries (B, H, N, r3), and the latent key and value, (B, 1, N, r3) and (B, 1, N, r3t), of tokens (B, N, C)."""
        linears, head, core = self.input_projections(), self.pre_head, self.pre_core
        if is_plain(*linears):
            weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
            parts = cores.latent_inputs(x, head, core, weights, biases)
            q, k, v = parts[0], parts[1], parts[len(linears) - 1]
        else:
            p, k, v = self.latents(x)
            q = cores.head_products(p, self.spec.embed_dim, head, core)
        k, v = k.unsqueeze(1), v.unsqueeze(1)  # (B, 1, N, r3), (B, 1, N, r3t)
        q, k = self.rotate_latent(q, k, rope)
        return q, k, k if self.values_are_keys else v

    def readout(self, mixed: Tensor) -> Tensor:
        """Returns (sum_i Y_i S_i^T) U2t^T + b, (B, N, O), of Y (B, N, H*r3t)."""
        head, core = self.post_head, self.post_core
        if is_plain(self.proj):
            return cores.latent_outputs(mixed, head, core, self.proj.weight, self.proj.bias)
        return self.proj(cores.head_sums(mixed, self.spec.out_dim, head, core))
