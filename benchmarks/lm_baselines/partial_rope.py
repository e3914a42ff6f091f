"""An attention layer that caches few rotated key pairs, and one latent for its other keys and for its values."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class PartialRope(NamedTuple):
    """Weights of a ``PartialRopeAttention``; H query heads, G key/value heads, R heads of rotated keys, which is G or 1.

    Attributes:
        query_rotated: (H, 2P, C), of which P real parts and then P imaginary parts rotate.
        query_plain: (H, E, C).
        key_rotated: (R, 2P, C).
        frequencies: number of each pair's rotation in the host's table, (R, P) int64.
        down: (L, C), to the latent.
        key_plain: (G, E, L), from the latent; empty, as query_plain, where all keys rotate.
        value: (G, D, L), from the latent.
    """

    query_rotated: Tensor
    query_plain: Tensor
    key_rotated: Tensor
    frequencies: Tensor
    down: Tensor
    key_plain: Tensor
    value: Tensor


def linear(weight: Tensor, like: nn.Linear) -> nn.Linear:
    """Returns a layer with the given weight (..., C), whose first axes are flattened, in another one's type.

    Args:
        weight: (..., C).
        like: decides type and device.
    """
    weight = weight.flatten(0, -2).to(like.weight).contiguous()
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


class PartialRopeAttention(nn.Module):
    """Scores are those of rotated pairs plus those of keys without a position; both come from what is cached.

    The cache gets the rotated pairs as keys, (B, R, N, 2P), and the latent as values, (B, 1, N, L). The latent is expanded to
    keys and values of G heads at each call: quality is compared here, not speed.

    Args:
        host: the dense module, whose o_proj, scale and config stay in use.
        weights: see ``PartialRope``.
    """

    def __init__(self, host: Any, weights: PartialRope) -> None:
        super().__init__()
        self.config, self.layer_idx, self.scaling, self.is_causal = host.config, host.layer_idx, host.scaling, True
        self.heads, self.key_heads = weights.query_rotated.shape[0], weights.value.shape[0]
        self.num_key_value_groups = self.heads // self.key_heads
        self.rotated_heads, pairs = weights.frequencies.shape
        self.cache_entries = self.rotated_heads * 2 * pairs + weights.down.shape[0]
        self.frequencies: Tensor
        self.register_buffer("frequencies", weights.frequencies)
        given = {name: weight for name, weight in weights._asdict().items() if name != "frequencies" and weight.numel()}
        made = {name: linear(weight, host.q_proj) for name, weight in given.items()}
        self.down, self.value = made["down"], made["value"]
        self.query_rotated, self.key_rotated = made["query_rotated"], made["key_rotated"]
        self.query_plain, self.key_plain = None, None
        if weights.key_plain.numel():
            self.query_plain, self.key_plain = made["query_plain"], made["key_plain"]
        self.o_proj = host.o_proj

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Returns pairs (B, heads, N, 2P) rotated; heads is a multiple of R, each R-th part of them with one row of frequencies.

        Args:
            x: P real parts, then P imaginary parts.
            cos, sin: the host's tables, (B or 1, N, D).
        """
        each = x.shape[1] // self.rotated_heads
        cos, sin = (
            table[..., self.frequencies].permute(0, 2, 1, 3).repeat_interleave(each, 1) for table in (cos, sin)
        )  # (B or 1, heads, N, P)
        real, imaginary = x.chunk(2, -1)
        return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], -1)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes attention with the cache of the host's class, see there."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        from transformers.models.llama.modeling_llama import eager_attention_forward

        cache = past_key_values if cache is None else cache
        latent = self.down(hidden_states).unsqueeze(1)  # (B, 1, N, L)
        rotated = self.rotate(self.split(self.key_rotated(hidden_states), self.rotated_heads), *position_embeddings)
        if cache is not None:
            rotated, latent = cache.update(rotated, latent, self.layer_idx)
        value = self.split(self.value(latent.squeeze(1)), self.key_heads)
        queries = [self.rotate(self.split(self.query_rotated(hidden_states), self.heads), *position_embeddings)]
        keys = [rotated.repeat_interleave(self.key_heads // self.rotated_heads, 1)]
        if self.query_plain is not None and self.key_plain is not None:
            queries.append(self.split(self.query_plain(hidden_states), self.heads))
            keys.append(self.split(self.key_plain(latent.squeeze(1)), self.key_heads))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        y, maps = attend(
            self, torch.cat(queries, -1), torch.cat(keys, -1), value, attention_mask, scaling=self.scaling, **kwargs
        )
        return self.o_proj(y.flatten(2)), maps

    @staticmethod
    def split(x: Tensor, heads: int) -> Tensor:
        """Returns (B, N, heads * width) as (B, heads, N, width)."""
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)
