"""The base of attention layers whose heads share one latent key, and one latent value or the key's latent."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.attention import rope as rotary
from vit_tucker.attention.contraction import joint_linear
from vit_tucker.attention.host import HostSpec
from vit_tucker.attention.linear import augmented_weight, linear_weight
from vit_tucker.attention.module import AttentionModule
from vit_tucker.attention.rope import spread_rotations
from vit_tucker.tensor.rotary import RotaryPairs


class LatentModule(AttentionModule):
    """Base of layers with one latent key of width r3 for all heads, and a latent value or the key's latent in its place.

    Attributes:
        pair_rotations: with latent RoPE a buffer (r3/2,): for each latent pair the number of the column pair of the host's table
            by which it rotates; else None.
    """

    pair_rotations: Tensor | None

    def add_rotations(self, spec: HostSpec, width: int, **factory: Any) -> None:
        """Registers the buffer of the rotations of a latent key.

        Args:
            spec: the host.
            width: of the latent key.
            **factory: ``device`` of the buffer.
        """
        device = factory.get("device")
        rotations = torch.empty(width // 2, dtype=torch.int64, device=device) if spec.rotates_latent else None
        self.register_buffer("pair_rotations", rotations)

    def init_rotations(self) -> None:
        """Spreads the latent pairs evenly over the host's rotations."""
        if self.pair_rotations is not None:
            width = 2 * len(self.pair_rotations)
            self.pair_rotations.copy_(spread_rotations(width, self.num_heads, self.head_dim))

    @property
    @abstractmethod
    def latent_projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear | None]:
        """Returns the Linears that form the latents of queries, keys and values; None where values share the keys' latent."""

    @property
    def value_projection(self) -> nn.Linear:
        """Returns the Linear that forms the latent value: that of the key where they share one."""
        _, key, value = self.latent_projections
        return key if value is None else value

    @property
    def values_are_keys(self) -> bool:
        """Returns whether the latent value is the latent key itself: they share one that does not rotate."""
        return self.latent_projections[2] is None and self.pair_rotations is None

    def input_projections(self) -> list[nn.Linear]:
        """Returns the Linears that form the latents."""
        return [linear for linear in self.latent_projections if linear is not None]

    def latents(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the latents of queries, keys and values, (B, N, r) each, of tokens (B, N, C)."""
        latents = joint_linear(x, self.input_projections())
        return latents[0], latents[1], latents[-1]

    def rotate_latent(self, q: Tensor, k: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns queries and latent key, rotated where the latent rotates.

        Args:
            q: (B, H, N, r3) queries.
            k: (B, 1, N, r3) latent key.
            rope: (N', 2 D) or (B, N', 2 D) table of the call, or None.
        """
        if self.pair_rotations is None or self.spec.rope is None:
            return q, k
        return rotary.rotate_latent(q, k, rope, self.pair_rotations, self.spec.rope)

    @property
    def kv_width(self) -> int | None:
        """Returns the numbers per token in a KV cache: those of the latent key and value, or of the one that they share.

        A decoder's cache holds a shared latent twice where it rotates: as key, rotated, and as value.
        """
        _, key, value = self.latent_projections
        once = self.values_are_keys or (value is None and not self.spec.causal)
        return key.out_features + (0 if once else self.value_projection.out_features)

    @property
    def latent_width(self) -> int | None:
        """Returns the width of the one key that rotates for all heads (latent RoPE); None without one."""
        return None if self.pair_rotations is None else 2 * len(self.pair_rotations)

    def index_limits(self) -> dict[str, int]:
        """Returns how many rotations the host's table has, for the buffer that chooses from them."""
        return {} if self.pair_rotations is None else {"pair_rotations": self.num_heads * (self.head_dim // 2)}

    def latent_rotations(self) -> Tensor:
        """Returns the numbers of the latent pairs' rotations, (r3/2,)."""
        return super().latent_rotations() if self.pair_rotations is None else self.pair_rotations

    def shared_rotary_pairs(self, left: Tensor, right: Tensor) -> RotaryPairs:
        """Returns pairs left_i right^T of all heads, (H, I, r3) and (J, r3), with the latent's rotations."""
        assert self.pair_rotations is not None
        rotations = self.pair_rotations.expand(self.num_heads, -1)
        return RotaryPairs(left, right.expand(self.num_heads, -1, -1), rotations)

    def latent_bases(self) -> tuple[Tensor, Tensor]:
        """Returns the weights that form keys, their bias as a last row, and values, float64: one tensor where both are equal."""
        _, key, value = self.latent_projections
        values = linear_weight(self.value_projection)
        return (values if value is None and key.bias is None else augmented_weight(key)), values
