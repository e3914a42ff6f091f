"""Finds the modules that move information between tokens besides the attention whose maps are known."""

from collections.abc import Iterable

from torch import nn

from vit_tucker.hosts.find import find_attention, find_other_attention


def is_pool(module: nn.Module) -> bool:
    """Returns whether a module is attention of a learned query that reads the tokens out."""
    return type(module).__name__.startswith("AttentionPool")


def find_token_mixers(model: nn.Module, attention: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Finds modules that mix tokens besides the given layers, by full name: convolutions, pooling and other attention."""
    known = set(attention)
    inside = {part for layer in known for part in layer.modules()}
    others = {name: model.get_submodule(name) for name in find_other_attention(model)}
    others |= {name: module for name, module in find_attention(model).items() if module not in known}
    spatial = (nn.Conv1d, nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    for name, module in model.named_modules():
        if isinstance(module, spatial) and module not in inside:
            size = module.kernel_size
            if max(size if isinstance(size, tuple) else (size,)) > 1:
                others[name] = module
    return others
