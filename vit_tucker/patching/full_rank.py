"""Finds the config by which a method replaces the attention of a whole model without loss."""

from torch import nn

from vit_tucker.attention.base import AttentionConfig
from vit_tucker.attention.options import Rule
from vit_tucker.attention.registry import get_method
from vit_tucker.errors import PatchError, naming
from vit_tucker.hosts.families import read_host
from vit_tucker.hosts.find import find_attention, inner
from vit_tucker.patching.layer_configs import PLACEMENT_FIELDS


def full_rank_config(model: nn.Module, method: str) -> AttentionConfig:
    """Returns the exact config of a method for a model: patched with it, the model gives its own outputs, to rounding.

    Args:
        model: a dense timm model; it is not touched, and may be on the meta device.
        method: a registered name.

    Returns:
        The first layer's config, with a rule for each layer whose full ranks are others.

    Raises:
        PatchError: no attention, or a layer that the method can't carry; names it.
    """
    model = inner(model)
    cls, configs = get_method(method), {}
    for name, module in find_attention(model).items():
        with naming(name):
            spec = read_host(module, model).spec
            configs[name] = cls.full_rank(spec)
            configs[name].refuse_features(spec)
            configs[name].check(spec)
    if not configs:
        raise PatchError(f"{type(model).__name__} has no attention module that vit_tucker supports")
    first = next(iter(configs.values()))
    options = {name: config.model_dump(exclude=PLACEMENT_FIELDS) for name, config in configs.items()
               if config != first}  # fmt: skip
    return first.model_copy(update={"rules": tuple(Rule(layers=name, **kept) for name, kept in options.items())})
