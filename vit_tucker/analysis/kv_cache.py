"""The KV cache that a model's attention layers would need: what each token leaves for later ones to attend to."""

from torch import nn

from vit_tucker.attention.host import HostSpec
from vit_tucker.attention.module import AttentionModule
from vit_tucker.errors import PatchError
from vit_tucker.hosts.families import read_host
from vit_tucker.hosts.find import find_attention
from vit_tucker.hosts.tokens import count_tokens


def count_kv_entries(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> int | None:
    """Counts the numbers in the KV cache of all self-attention layers for one image.

    Args:
        model: dense or patched; it is not changed.
        img_size: pixels; the model's own size if None.

    Returns:
        Their number, or None if a layer does not say what it keeps, or the tokens can't be counted.
    """
    layers: dict[str, tuple[HostSpec, int | None]] = {}
    try:
        for name, module in find_attention(model).items():
            if isinstance(module, AttentionModule):
                layers[name] = module.spec, module.kv_width
            else:
                spec = read_host(module, model).spec
                layers[name] = spec, 2 * (spec.num_kv_heads or spec.num_heads) * spec.head_dim
    except PatchError:
        return None
    tokens = count_tokens(model, {name: spec.layout for name, (spec, _) in layers.items()}, img_size)
    total = 0
    for name, (_, width) in layers.items():
        if width is None or name not in tokens:
            return None
        sequences, length = tokens[name]
        total += sequences * length * width
    return total
