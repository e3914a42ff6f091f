"""Writes weights back into attention modules of timm's, through the views of their parameters that the readers give.

So the order of heads and projections in each class of timm is written down once, in its reader.
"""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.attention.effective import full_name
from vit_tucker.attention.heads import PerHeadModule
from vit_tucker.attention.host import MHAWeights
from vit_tucker.attention.module import AttentionModule
from vit_tucker.attention.special_cases import fit_biases
from vit_tucker.errors import PatchError
from vit_tucker.hosts.families import read_host
from vit_tucker.hosts.slot import ATTENTION
from vit_tucker.linear.base import LinearModule


def write_layer(module: nn.Module, layer: AttentionModule, weights: MHAWeights, model: nn.Module | None = None) -> None:
    """Writes the attention of a layer of ours into a host's module, in place: weights, position bias, norms and gate.

    Args:
        module: of the class, and with the shape, of the module that the layer replaced.
        layer: of ours.
        weights: of the layer's heads, see ``heads_form``; H heads.
        model: that the layer is from, see ``read_host``.

    Raises:
        PatchError: the module can't hold the layer's attention; it may be half written then.
    """
    ATTENTION.restore(module, layer)
    host = read_host(module, model)
    weights = fit_biases(weights, host.own)
    with torch.no_grad():
        for name, place in vars(host.own).items():
            if place is not None:
                write_heads(place, getattr(weights, name))
    for name, part in chain(*(parts.items() for parts in host.spec.extras.values())):
        if name != "position_bias" and not isinstance(layer, PerHeadModule):
            raise PatchError(f"{type(layer).__name__} has no {name}, the host has one")
        part.load_state_dict(getattr(layer, name).state_dict())
    written = read_host(module, model).weights
    for name, wanted in vars(weights).items():
        got = getattr(written, name)
        if wanted is not None and not torch.equal(got, wanted.to(got)):
            raise PatchError(f"{full_name(module)}: its reader returns no view of its {name}, nothing can be written")


def write_linear(module: Any, layer: LinearModule) -> None:
    """Writes the weights that a layer of ours is equal to into a Linear of the host's, in place.

    Raises:
        PatchError: the layer has a bias, or a shape, that the Linear has no place for.
    """
    weights = layer.dense_weights()
    if (weights.bias is None) != (module.bias is None) or weights.weight.shape != module.weight.flatten(1).shape:
        raise PatchError(f"{full_name(module)}: the dense weights of {type(layer).__name__} have another shape")
    with torch.no_grad():
        module.weight.copy_(weights.weight.view_as(module.weight))
        if weights.bias is not None:
            module.bias.copy_(weights.bias)


def write_heads(place: Tensor, value: Tensor | None) -> None:
    """Copies weights or biases of H heads into a place for as many, or for G key/value heads.

    Args:
        place: (G, ...) weights or biases of the host's heads, changed in place.
        value: (H, ...) of as many heads or more; None for zeros.

    Raises:
        PatchError: heads that share a key or a value have different ones.
    """
    if value is None:
        place.zero_()
        return
    if len(value) != len(place):
        groups = value.unflatten(0, (len(place), -1))
        if not torch.equal(groups, groups[:, :1].expand_as(groups)):
            raise PatchError(f"its heads have keys and values of their own, the host has {len(place)} key/value heads")
        value = groups[:, 0]
    place.copy_(value)
