"""How many tokens each attention layer of a model receives."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vit_tucker.attention.call import to_sequences
from vit_tucker.hosts.images import input_shape
from vit_tucker.hosts.structure import structure_copy, without_global_hooks


def count_tokens(
    model: nn.Module, layouts: Mapping[str, str], img_size: int | tuple[int, int] | None = None
) -> dict[str, tuple[int, int]]:
    """Sequences per image and tokens per sequence that each named module receives.

    Args:
        model: any model that maps (B, 3, H, W) images; it is not touched.
        layouts: of the tokens that each module takes, see ``HostSpec``, by full module name.
        img_size: pixels; the model's own size if None.

    Returns:
        name -> (sequences, tokens); empty if the model can't run on the meta device.
    """
    try:
        probe = structure_copy(model).eval()
        seen: dict[str, tuple[int, int]] = {}

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                sequences, tokens, _ = to_sequences(args[0] if args else kwargs["x"], layouts[name]).shape
                seen[name] = (sequences, tokens)

            return hook

        for name in layouts:
            probe.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        with torch.no_grad(), without_global_hooks():
            probe(torch.empty(1, *input_shape(model, img_size), device="meta", dtype=dtype))
    except Exception:
        return {}
    return seen
