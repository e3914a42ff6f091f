"""Merges adapters and parametrizations of hosts, and refuses parts that compute something else than their weights."""

from typing import Any, cast

import torch
from torch import nn

from vit_tucker.attention.effective import full_name, with_plain_parts
from vit_tucker.attention.parametrized import functional_hooks
from vit_tucker.errors import WeightsError

PROJECTIONS = ("qkv", "q_proj", "k_proj", "v_proj", "qk", "v", "proj", "o_proj", "c_attn", "c_proj")
"""Names of the parts of hosts whose weights the readers read."""


def plain_host(module: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """Makes the parts of a host's module plain, see ``with_plain_parts``; also returns the classes of those that were not.

    Args:
        module: of a known class; it is not changed.

    Raises:
        WeightsError: the module or a part computes something else than its weights say.
    """
    refuse_other_forward(module)
    if functional_hooks(module):
        raise WeightsError("parameters of its own are pruned or normalised by hooks: make them permanent first")
    plain = with_plain_parts(module, PROJECTIONS)
    parts = dict(module.named_children())
    merged = {name: full_name(part) for name, part in parts.items() if not is_same(getattr(plain, name), part)}
    qkv, read = (cast(Any, each)._modules.get("qkv") for each in (module, plain))
    if "qkv" in merged and reads_weight(module) and not (qkv.weight.is_meta or torch.equal(qkv.weight, read.weight)):
        raise WeightsError(
            f"its qkv is a {full_name(qkv)}, whose weight it reads without calling it: the adapter has no effect; "
            "merge_and_unload() or unload() it first"
        )
    return plain, merged


def refuse_other_forward(module: nn.Module) -> None:
    """Raises WeightsError for a module of a library whose forward is another's: replaced on the module or in its class."""
    written: str = getattr(type(module).forward, "__globals__", {}).get("__name__", "")
    library = type(module).__module__.partition(".")[0]
    if "forward" in vars(module) or not written.startswith(
        (f"{library}.", "torch.")
    ):  # torch's wrappers change nothing
        raise WeightsError(f"its forward is not that of {full_name(module)}: another has been put in its place")


def reads_weight(module: Any) -> bool:
    """Returns whether a module multiplies by the weight of ``qkv`` instead of calling it: BEiT's, EVA's with biases apart."""
    return getattr(module, "q_bias", None) is not None and not getattr(module, "qkv_bias_separate", False)


def is_same(plain: nn.Module, part: nn.Module) -> bool:
    """Returns whether a plain part is what stood there, hooks of gradients apart."""
    return type(plain) is type(part) and not functional_hooks(part)
