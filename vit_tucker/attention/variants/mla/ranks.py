"""Widths that the latents of MLA can have."""

from vit_tucker.attention.host import HostSpec
from vit_tucker.attention.variants.tucker.ranks import refuse_odd
from vit_tucker.errors import PatchError


def full_latents(spec: HostSpec, shared_kv: bool) -> tuple[int, int]:
    """The largest useful latents of queries and of keys and values; rotated keys need H*D columns."""
    key_value = spec.attn_dim * (2 if shared_kv else 1)
    return min(spec.embed_dim, spec.attn_dim), key_value if spec.rotates_latent else min(spec.embed_dim, key_value)


def refuse_ranks(spec: HostSpec, q_lora_rank: int, kv_lora_rank: int, shared_kv: bool) -> None:
    """Raise PatchError for latents that a layer in place of such a host can't have; names the limit."""
    refuse_odd(spec, "kv_lora_rank", kv_lora_rank)
    given = {"q_lora_rank": q_lora_rank, "kv_lora_rank": kv_lora_rank}
    for (name, rank), limit in zip(given.items(), full_latents(spec, shared_kv), strict=True):
        if rank > limit:
            raise PatchError(f"{name}={rank} is above its full rank {limit}")
