"""Backends of attention: what computes softmax(Q K^T) V, on which device, and why. Importing this package registers them.

    sdpa        torch's scaled_dot_product_attention, heads that share a key packed into its queries
    blocked     plain products block by block with the maps recomputed: bfloat16 on CPUs, where torch's own kernel is slow
    eager       plain products with the attention maps in memory, for hooks that look at them
    flash_attn  the flash-attn package, called with its own grouped key/value heads
    flex        torch's flex_attention, compiled
    latent      Tucker Attention as a whole on the CPU, some images at a time: less memory at high ranks
    triton      Tucker Attention as a whole, queries and output cores inside one kernel of ours

``auto`` chooses among them, see ``registry.preferences``; any other computes every call or fails. Whatever runs is logged,
once per kind of call, with the reason. A new one is a file with two functions and ``register_backend(Backend(...))``.
"""

from vit_tucker.attention.backends import blocked, eager, flash, flex, flops, sdpa, tucker_cpu, tucker_triton
from vit_tucker.attention.backends.base import Backend, Facts
from vit_tucker.attention.backends.registry import (
    AUTO,
    Choices,
    choose,
    get_backend,
    is_whole,
    list_backends,
    recorded_choices,
    register_backend,
)

__all__ = [
    "AUTO",
    "Backend",
    "Choices",
    "Facts",
    "choose",
    "get_backend",
    "is_whole",
    "list_backends",
    "recorded_choices",
    "register_backend",
]
_ = (blocked, eager, flash, flex, flops, sdpa, tucker_cpu, tucker_triton)
