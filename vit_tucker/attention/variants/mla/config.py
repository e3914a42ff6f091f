"""Multi-head latent attention: queries, and keys with values, go through low-rank latents.

    Q_i = x WDQ WUQ_i,  K_i = x WDKV WUK_i,  V_i = x WDKV WUV_i
    parameters per layer: d^2 + 5 d c with one latent of width c for keys and values, d^2 + 6 d c with two

For hosts with RoPE the latent key itself is rotated (latent RoPE; no decoupled RoPE): Q_i WUK_i^T meets x WDKV, both rotated, so
that a query is still one matrix times a token. All heads then share the latent as key and value. Where norms of the heads' keys
come before the rotation there is no such form; then each head's key is rotated, as in the host.

Where it costs less, for latents about as wide as a head or narrower, layers are computed in the same form without rotations, in
training as well: queries x WDQ (WUQ_i WUK_i^T) meet the latent, and outputs are the heads' averaged latents times WUV_i WO_i
(absorption).
Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; latent RoPE: Tucker Attention, arXiv 2603.30033, Eqs 13-14.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from vit_tucker.attention.attend import attend_flops
from vit_tucker.attention.base import ParameterCount, PerHeadConfig
from vit_tucker.attention.host import HostSpec, count_extras
from vit_tucker.attention.options import Rank
from vit_tucker.attention.registry import register_method
from vit_tucker.attention.variants.mla.layer import MLA
from vit_tucker.attention.variants.mla.ranks import (
    absorbing_saves,
    can_absorb,
    full_latents,
    has_head_key_bias,
    refuse_ranks,
)
from vit_tucker.attention.variants.tucker.ranks import even_rank
from vit_tucker.errors import PatchError
from vit_tucker.show import methods
from vit_tucker.show.methods import MethodDisplay


@register_method("mla")
class MLAConfig(PerHeadConfig):
    """Multi-head latent attention with a query latent and a key/value latent."""

    latent_rope: ClassVar[bool] = True

    display: ClassVar[MethodDisplay] = methods.MLA

    method: Literal["mla"] = "mla"

    q_lora_rank: Rank = Field(description="Width of the query latent, at most embed_dim.")
    kv_lora_rank: Rank = Field(description="Width of the key/value latent, at most embed_dim.")
    shared_kv: bool = Field(
        default=True, description="Keys and values share one latent; false gives each its own of that width."
    )

    def rank_options(self) -> dict[str, Any]:
        """Returns the widths of both latents."""
        return {"q_lora_rank": self.q_lora_rank, "kv_lora_rank": self.kv_lora_rank}

    def check(self, spec: HostSpec) -> None:
        """Raises PatchError for latents above their full rank, or odd ones that rotate."""
        refuse_ranks(spec, self.q_lora_rank, self.kv_lora_rank, self.shared_kv)
        if spec.causal and "qk_norm" in spec.extras:
            raise PatchError(
                "its heads' keys are normalised one by one before a cache holds them: there is no latent key to cache; "
                "gqa and mha carry such norms"
            )

    @classmethod
    def full_rank(cls, spec: HostSpec) -> "MLAConfig":
        """Returns latents as wide as the projections' ranks."""
        shared = not spec.rotates_latent
        query, key_value = full_latents(spec, shared)
        return cls(q_lora_rank=query, kv_lora_rank=key_value, shared_kv=shared)

    @classmethod
    def example(cls, spec: HostSpec) -> "MLAConfig":
        """Returns latents of an eighth of the width."""
        rank = max(1, spec.embed_dim // 8)
        return cls(q_lora_rank=rank, kv_lora_rank=even_rank(rank) if spec.rotates_latent else rank)

    def build(self, spec: HostSpec, **factory: Any) -> MLA:
        """Returns the layer with its own random initialisation."""
        return MLA(spec, self.q_lora_rank, self.kv_lora_rank, shared_kv=self.shared_kv, **factory)

    def count_parameters(self, spec: HostSpec) -> ParameterCount:
        """Counts cQ (C + HD) + cKV (C + 2 HD) + HD O weights (d^2 + 5 d c, Table 1); two latents: cKV C more (d^2 + 6 d c)."""
        query = self.q_lora_rank * (spec.embed_dim + spec.attn_dim)
        latents = 1 if self.shared_kv else 2
        key_value = self.kv_lora_rank * (latents * spec.embed_dim + 2 * spec.attn_dim)
        key_bias = spec.attn_dim * has_head_key_bias(spec) + self.kv_lora_rank * spec.latent_key_bias
        biases = 2 * spec.attn_dim * spec.qkv_bias + key_bias + spec.out_dim * spec.proj_bias
        return ParameterCount(query + key_value + spec.attn_dim * spec.out_dim, biases + count_extras(spec))

    def count_flops(self, spec: HostSpec, num_tokens: int) -> int:
        """Counts the products for a batch of one image.

        Absorbed: queries and outputs of width cKV instead of the heads' keys and values, and the products of up projections that
        a batch forms once. With RoPE and wide latents, and in decoders: the same widths, no such products.
        """
        heads, width, rank = spec.num_heads, spec.head_dim, self.kv_lora_rank
        latent = attend_flops(heads, num_tokens, rank, rank)
        if can_absorb(spec) and absorbing_saves(spec, self.q_lora_rank, rank, 1, num_tokens):
            downs = spec.embed_dim * (self.q_lora_rank + rank * (1 if self.shared_kv else 2))
            tokens = num_tokens * (downs + heads * rank * (self.q_lora_rank + spec.out_dim))
            folds = (self.q_lora_rank + spec.qkv_bias) * rank + spec.out_dim * (rank + spec.qkv_bias)
            return 2 * (tokens + heads * width * folds) + latent
        flops = super().count_flops(spec, num_tokens)
        return (
            flops - attend_flops(heads, num_tokens, width, width) + latent
            if spec.rotates_latent or spec.causal
            else flops
        )
