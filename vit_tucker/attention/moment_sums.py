"""Sums the moments of a layer over its calls: head by head, or over all heads at once where only their mean is read.

A head's key moment is X^T W_i X with W_i = s_i^T s_i, times the kernel of the rotations, N x N; its trace is <W_i, X X^T>. So a
first sweep over the calls finds the traces without forming any metric, and a second one sums W_i / trace over the heads before
the tokens are multiplied, once instead of H times. Value moments, X^T (sum_i p_i^T |g| p_i) X, need no second sweep.
"""

import torch
from torch import Tensor

from vit_tucker.attention.host import HostSpec, MHAWeights
from vit_tucker.attention.host_maps import Maps, host_maps, joined
from vit_tucker.attention.moments import LayerCall, Moments, Needs
from vit_tucker.attention.rope import angle_kernel, rotate_heads
from vit_tucker.attention.rotation_sums import RotationSums
from vit_tucker.tensor.metric import covariance, inverse_traces
from vit_tucker.tensor.rotary import pair_shares

CONSTANT = 1e-11
"""Variance of the tokens over their squared mean below which they count as constant: float32 rounding is 1e-14."""
MAP_NUMBERS = 2**25
"""Attention maps of a slice of a call have about so many numbers at most."""


class MomentSums:
    """Running sums behind ``Moments``. Products in the tokens' dtype (at least float32), sums in float64.

    Args:
        spec, weights: of the host.
        needs: which moments are read. With key="mean" all calls are added, and then once more by ``add_keys``.
    """

    def __init__(self, spec: HostSpec, weights: MHAWeights, needs: Needs | None = None) -> None:
        self.spec, self.needs = spec, needs or Needs()
        like = weights.query
        self.dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.weights = weights.to(self.dtype)
        heads, c, out, hd = spec.num_heads, spec.embed_dim, spec.out_dim, spec.attn_dim
        self.columns = c + (spec.rope is not None and weights.key_bias is not None)
        key = c if spec.rope is None else c + 1
        shapes: dict[str, tuple[int, ...]] = {"query": (c + 1, c + 1), "output": (out, out)}
        if self.needs.key != "none":
            shapes["key"] = (heads, key, key) if self.needs.key == "heads" else (key, key)
        if self.needs.key == "mean":
            shapes |= {"traces": (heads,), "crosses": (heads, c), "constants": (heads,)}
        if self.needs.value != "none":
            shapes["value"] = (heads, c, c) if self.needs.value == "heads" else (c, c)
            shapes["value_mean"] = (heads, c)
        if self.needs.gradients:
            shapes |= {"query_grad": (hd, hd), "kv_grad": (2 * hd, 2 * hd)}
        self.sums = {name: torch.zeros(s, dtype=torch.float64, device=like.device) for name, s in shapes.items()}
        self.weight_sum = torch.zeros((), dtype=torch.float64, device=like.device)
        self.spread = torch.zeros((), dtype=torch.float64, device=like.device)
        self.tokens = 0
        self.shift: Tensor | None = None
        self.rotations: RotationSums | None = None
        if self.needs.rotations and spec.rope is not None and not spec.rope.per_head:
            self.rotations = RotationSums(spec.rope, spec.head_dim // 2, like.device)
        self.rotation_weights = torch.empty(0)
        if spec.rope is not None:
            self.rotation_weights = pair_shares(self.weights.rotary_pairs(spec.rope))

    @property
    def second_sweep(self) -> bool:
        """Returns whether all calls are to be added a second time, by ``add_keys``."""
        return self.needs.key == "mean"

    def add(self, call: LayerCall) -> None:
        """Adds one ``call``, in slices of the batch, so that the attention maps stay small."""
        for part in self._slices(call):
            if self.shift is None:
                self.shift = part.of_tokens(part.x.to(self.dtype)).mean(
                    0
                )  # large means don't eat the digits of squares
            maps = host_maps(part, self.weights, self.spec, self.shift)
            self._add_tokens(part, maps)
            if self.needs.key == "heads":
                self.sums["key"] += self._head_keys(maps, part.rope)
            elif self.needs.key == "mean":
                self._add_traces(maps, part.rope)
            if self.needs.value != "none":
                self._add_values(maps)
            if self.needs.gradients:
                self._add_gradients(maps, part)
            if self.rotations is not None and part.rope is not None:
                self.rotations.add(maps, part.rope)

    def add_keys(self, call: LayerCall) -> None:
        """Adds the keys of a ``call`` once more, when all calls have been added: each head weighs the inverse of its trace."""
        traces, constants = self._traces()
        own = traces + constants if self.columns > self.spec.embed_dim else traces
        shares = (inverse_traces(own) / len(own)).to(self.dtype)
        assert self.shift is not None
        for part in self._slices(call):
            maps = host_maps(part, self.weights, self.spec, self.shift)
            scaled = maps.s * shares.sqrt()[:, None, None]
            if part.rope is None:
                flat = scaled.flatten(1, 2)  # (B, H*N, N)
                weighted = flat.mT @ flat
            else:
                weighted = self._kernels(scaled, part.rope).sum(1)
            tokens = self._with_constant(maps.centred)
            self.sums["key"] += tokens.flatten(0, 1).mT @ (weighted @ tokens).flatten(0, 1)

    def _slices(self, call: LayerCall) -> list[LayerCall]:
        numbers = call.x.shape[0] * self.spec.num_heads * call.x.shape[1] ** 2
        parts = torch.arange(call.x.shape[0], device=call.x.device).chunk(max(1, int(numbers / MAP_NUMBERS)))
        return [call.part(part) for part in parts]

    def _add_tokens(self, call: LayerCall, maps: Maps) -> None:
        tokens, probe = call.of_tokens(maps.x), call.of_tokens(maps.probe)
        ones = torch.cat([tokens, torch.ones_like(tokens[:, :1])], -1)
        self.sums["query"] += ones.mT @ ones
        self.sums["output"] += probe.mT @ probe
        self.weight_sum += maps.probe.norm(dim=-1).sum()
        self.spread += maps.centred.square().sum()
        self.tokens += len(ones)

    def _add_values(self, maps: Maps) -> None:
        token_weights = maps.probe.norm(dim=-1)  # (B, N)
        weighted = maps.p * token_weights[:, None, :, None]
        means = weighted.sum(-2)  # (B, H, N)
        self.sums["value_mean"] += torch.einsum("bhn,bnc->hc", means, maps.centred)
        if self.needs.value == "mean":
            kernel = (weighted.flatten(1, 2).mT @ maps.p.flatten(1, 2)) @ maps.centred  # (B, N, C)
            self.sums["value"] += maps.centred.flatten(0, 1).mT @ kernel.flatten(0, 1)
            return
        averaged = maps.p @ maps.centred.unsqueeze(1)
        for head in range(self.spec.num_heads):
            avg = averaged[:, head].flatten(0, 1)
            self.sums["value"][head] += (avg * token_weights.flatten().unsqueeze(1)).mT @ avg

    def _add_gradients(self, maps: Maps, call: LayerCall) -> None:
        spec = self.spec
        grad_q, grad_k = maps.s @ maps.k * spec.scale, maps.s.mT @ maps.q * spec.scale
        if spec.rope is not None:
            grad_q, grad_k = (rotate_heads(g, call.rope, spec.rope, inverse=True) for g in (grad_q, grad_k))
        grad_kv = torch.cat([joined(grad_k), joined(maps.p.mT @ maps.probe_v)], -1)
        self.sums["query_grad"] += joined(grad_q).mT @ joined(grad_q)
        self.sums["kv_grad"] += grad_kv.mT @ grad_kv

    def _with_constant(self, centred: Tensor) -> Tensor:
        """Returns the tokens of the key moments: x - shift (B, N, C), with RoPE [x - shift, 1]."""
        return centred if self.spec.rope is None else torch.cat([centred, torch.ones_like(centred[..., :1])], -1)

    def _kernels(self, s: Tensor, rope: Tensor | None) -> Tensor:
        """Returns W_i (B, H, N, N) of gradients of the scores, see the module's formulas.

        s is (B, H, N, N), rope the call's table.
        """
        products = s.mT @ s
        if rope is None or self.spec.rope is None:
            return products
        return products * angle_kernel(rope, self.spec.rope, self.rotation_weights, s.shape[-1])

    def _add_traces(self, maps: Maps, rope: Tensor | None) -> None:
        """Adds what the traces of the heads' key moments follow from, for tokens x - shift."""
        kernels, centred = self._kernels(maps.s, rope), maps.centred
        self.sums["traces"] += (kernels * (centred @ centred.mT).unsqueeze(1)).sum((0, 2, 3))
        if self.spec.rope is not None:
            rows = kernels.sum(-1)  # (B, H, N)
            self.sums["crosses"] += torch.einsum("bhn,bnc->hc", rows, centred)
            self.sums["constants"] += rows.sum((0, 2))

    def _traces(self) -> tuple[Tensor, Tensor]:
        """Returns the sums of the traces of the heads' key moments for tokens x, and what a constant 1 beside them adds, (H,)."""
        assert self.shift is not None
        shift, constants = self.shift.double(), self.sums["constants"]
        traces = self.sums["traces"] + 2 * self.sums["crosses"] @ shift + constants * shift.square().sum()
        return (traces if self.spec.rope is not None else self.sums["traces"]).clamp_min(0), constants.clamp_min(0)

    def _head_keys(self, maps: Maps, rope: Tensor | None) -> Tensor:
        """Returns sums of kappa kappa^T, (H, C, C), with RoPE (H, C + 1, C + 1) for the tokens [x - shift, 1]."""
        if self.spec.rope is None:
            kappa = maps.s @ maps.centred.unsqueeze(1)  # (B, H, N, C)
            return torch.stack([kap.mT @ kap for kap in kappa.transpose(0, 1).flatten(1, 2)])
        tokens = self._with_constant(maps.centred)  # (B, N, C + 1)
        weighted = self._kernels(maps.s, rope)
        return torch.stack(
            [tokens.flatten(0, 1).mT @ (part @ tokens).flatten(0, 1) for part in weighted.transpose(0, 1)]
        )

    def _unshifted(self, key: Tensor) -> Tensor:
        """Returns key moments in the coordinates of the tokens: [x, 1] instead of [x - shift, 1]."""
        if self.spec.rope is None or self.shift is None:
            return key
        change = torch.eye(key.shape[-1], dtype=key.dtype, device=key.device)
        change[:-1, -1] = self.shift.double()
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
        names = ("query", "output", "query_grad", "kv_grad")
        per_token = {name: self.sums[name] / self.tokens for name in names if name in self.sums}
        folds = None if self.rotations is None else self.rotations.folds()
        return Moments(
            tokens=self.tokens,
            mean=per_token["query"][-1, :-1],
            rotations=folds,
            **per_token,
            **self._keys(),
            **self._values(),
        )

    def _keys(self) -> dict[str, Tensor]:
        if self.needs.key == "none":
            return {}
        if self.needs.key == "heads":
            key = self._unshifted(self.sums["key"] / self.tokens)
            return {"key": key, "key_traces": key.diagonal(dim1=-2, dim2=-1).sum(-1)}
        traces, constants = self._traces()
        mean = self._unshifted(self.sums["key"])[: self.columns, : self.columns]
        return {"key_mean": mean, "key_traces": (traces + constants) / self.tokens}

    def _values(self) -> dict[str, Tensor]:
        if self.needs.value == "none":
            return {}
        assert self.shift is not None
        shifted = self.sums["value_mean"] / self.weight_sum
        value, means = self.sums["value"] / self.weight_sum, {"value_mean": shifted + self.shift.double()}
        if self.needs.value == "mean":
            return {"value_covariance": (value - shifted.mT @ shifted) / len(shifted), **means}
        value = covariance(value, shifted)
        return {"value": value, "value_covariance": value.mean(0), **means}
