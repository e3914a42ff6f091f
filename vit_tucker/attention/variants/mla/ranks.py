"""Widths that the latents of MLA can have, and which form of the layer costs less at them."""

from vit_tucker.attention.host import CALL_FEATURES, HostSpec
from vit_tucker.attention.variants.tucker.ranks import refuse_odd
from vit_tucker.errors import PatchError


def full_latents(spec: HostSpec, shared_kv: bool) -> tuple[int, int]:
    """Returns the largest useful latents of queries and of keys and values; rotated keys need a column for each of the keys'."""
    key_value = spec.kv_dim * (2 if shared_kv else 1)
    return min(spec.embed_dim, spec.attn_dim), key_value if spec.rotates_latent else min(spec.embed_dim, key_value)


def refuse_ranks(spec: HostSpec, q_lora_rank: int, kv_lora_rank: int, shared_kv: bool) -> None:
    """Raises PatchError for latents that a layer in place of such a host can't have; names the limit.

    Args:
        spec: the host.
        q_lora_rank, kv_lora_rank: widths of the latents.
        shared_kv: keys and values share one latent.
    """
    refuse_odd(spec, "kv_lora_rank", kv_lora_rank)
    given = {"q_lora_rank": q_lora_rank, "kv_lora_rank": kv_lora_rank}
    for (name, rank), limit in zip(given.items(), full_latents(spec, shared_kv), strict=True):
        if rank > limit:
            raise PatchError(f"{name}={rank} is above its full rank {limit}")


def can_absorb(spec: HostSpec) -> bool:
    """Returns whether projections can be merged with attention (absorption).

    Nothing may come between projections and attention, or attention and output projection. A decoder attends in the latent
    already, which its cache holds.
    """
    return not spec.causal and all(feature in CALL_FEATURES for feature in spec.extras)


def absorbing_saves(spec: HostSpec, q_lora_rank: int, kv_lora_rank: int, images: int, num_tokens: int) -> bool:
    """Returns whether attending in the latent, with folded up projections (absorption), costs less.

    Per head and token the absorbed form has products of cKV (cQ + O + 2 N) multiply-adds, the expanded one of
    D (cQ + O + 2 N + 2 cKV); folding costs D cKV (cQ + O) per head once. Where latents rotate, both forms attend in the latent:
    then N plays no part.

    Args:
        spec: of the host.
        q_lora_rank, kv_lora_rank: cQ, cKV.
        images: of the batch.
        num_tokens: N, of an image.
    """
    width, rest = spec.head_dim, q_lora_rank + spec.out_dim
    keys = 0 if spec.rotates_latent else 2 * num_tokens
    saved = (width - kv_lora_rank) * (rest + keys) + 2 * kv_lora_rank * width
    return images * num_tokens * saved > width * kv_lora_rank * rest


def has_head_key_bias(spec: HostSpec) -> bool:
    """Returns whether each head's key has a bias: it cancels in the softmax unless a norm follows it."""
    return spec.has_key_bias and "qk_norm" in spec.extras
