"""Ranks chosen by a rule, over the layers of a model: from its weights, or from what they do to calibration images."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from vit_tucker.attention.options import Calibration, MethodConfig, RankRule, Rule
from vit_tucker.attention.variants.mha import MHAConfig
from vit_tucker.attention.variants.tucker.ranks import LayerTables, choose_ranks, even_rank, layer_tables, whiten
from vit_tucker.conversion.calibrate import collect_moments
from vit_tucker.conversion.inputs import InputBatch
from vit_tucker.conversion.observe import WatchedLayer, located
from vit_tucker.errors import PatchError
from vit_tucker.hosts.readers import Host
from vit_tucker.show.progress_bars import each
from vit_tucker.tensor.folding import best_fold
from vit_tucker.tensor.rotary import RotaryPairs, ordinary, unlifted_norm
from vit_tucker.tensor.tucker import Pairs, squared_norm

PRE_WEIGHT = 2.0
"""What a pre-softmax error counts: to first order it comes out up to three times too small on a trained ViT-S/14."""
CHOOSING = "choosing ranks of"

Config = TypeVar("Config", bound=MethodConfig)


@dataclass
class OpenLayer(WatchedLayer):
    """A layer whose ranks are yet to be chosen.

    Attributes:
        rule: by which.
        names: all places in the model where its module stands.
    """

    rule: RankRule = field(kw_only=True)
    names: tuple[str, ...] = field(kw_only=True)


def resolve_ranks(
    model: nn.Module,
    config: Config,
    configs: Mapping[str, MethodConfig],
    read: Mapping[str, Host],
    tokens: Mapping[str, tuple[int, int]],
    inputs: list[InputBatch] | None,
) -> Config:
    """Returns the config with rules for the layers whose ranks are yet to be chosen.

    Args:
        model: dense.
        config: of the patch.
        configs, read: config and host of each layer to patch, by full module name.
        tokens: see ``choose_layer_ranks``.
        inputs: of the calibration, if there is one.

    Raises:
        PatchError: no weights to look at, or see ``choose_layer_ranks``.
    """
    places: dict[int, list[str]] = {}
    for name in configs:
        places.setdefault(id(model.get_submodule(name)), []).append(name)
    layers = []
    for first, *others in places.values():
        rule = configs[first].rank_rule
        if rule is None:
            continue
        if read[first].weights.query.is_meta:
            raise PatchError(
                f"{first}: ranks {rule} are chosen from weights, but these are on the meta device; give the ranks"
            )
        module = model.get_submodule(first)
        layers.append(OpenLayer(first, module, read[first], rule=rule, names=(first, *others)))
    calibration = None if config.fitted_to is None or inputs is None else (config.fitted_to, inputs)
    chosen = choose_layer_ranks(model, layers, tokens, calibration)
    return config.model_copy(update={"rules": (*config.rules, *chosen)})


def choose_layer_ranks(
    model: nn.Module,
    layers: list[OpenLayer],
    tokens: Mapping[str, tuple[int, int]],
    calibration: tuple[Calibration, list[InputBatch]] | None,
) -> list[Rule]:
    """Returns rules that give each layer its ranks; layers with the same rank rule share its budget.

    Args:
        model: dense.
        layers: distinct modules of the model, on a real device.
        tokens: sequences per image and tokens of each, by name of the layer.
        calibration: options and images (B, channels, height, width) to look at; None: the weights alone decide, each tensor by
            its
            relative error.

    Raises:
        PatchError: the budget is too small, the operations can't be counted, or the images are unusable.
    """
    tables: dict[str, LayerTables] = {}
    for layer, pre, post in _tensors(model, layers, calibration):
        if layer.rule.flops is not None and layer.name not in tokens:
            raise PatchError(
                f"{layer.name}: ranks {layer.rule}: its tokens can't be counted; give a budget of parameters"
            )
        calls, num_tokens = tokens.get(layer.name, (1, 1))
        calls *= len(layer.names)  # a shared module computes at each of its places
        dense = layer.host.parameters.total
        if layer.rule.flops is not None:
            dense = calls * MHAConfig().count_flops(layer.host.spec, num_tokens)
        tables[layer.name] = layer_tables(layer.rule, layer.host.spec, pre, post, dense, calls, num_tokens)
    rules = []
    for rule in dict.fromkeys(layer.rule for layer in layers):
        group = [layer for layer in layers if layer.rule == rule]
        try:
            chosen = choose_ranks(rule, [tables[layer.name] for layer in group])
        except ValueError as error:
            raise PatchError(f"ranks {rule}: {error}") from None
        for layer, (pre_ranks, post_ranks) in zip(group, chosen, strict=True):
            options = {"ranks": pre_ranks, "post_ranks": post_ranks}
            rules.append(Rule(layers=tuple(map(_exactly, layer.names)), chosen_by=rule, **options))
    return rules


@torch.no_grad()
def _tensors(
    model: nn.Module, layers: list[OpenLayer], calibration: tuple[Calibration, list[InputBatch]] | None
) -> Iterator[tuple[OpenLayer, Pairs, Pairs]]:
    """Returns both tensors of each layer, in units that compare.

    By weights alone: shares of their norms. On images: errors of the layer's output relative to its size; of the final features,
    to first order, over the root of what the layer's output as a whole does to them. That is half-way between absolute and
    relative errors: to first order absolute ones would be right, but layers that do much are also where first order ends.
    """
    if calibration is None:
        for layer in each(layers, CHOOSING, "layers"):
            weights = layer.host.weights.double()
            pre, post = ordinary(weights.pre_tensor(layer.host.spec.rope)), weights.post_pairs()
            yield layer, _divided(pre, squared_norm(pre)), _divided(post, squared_norm(post))
        return
    options, inputs = calibration
    for layer, moments in collect_moments(model, layers, options, inputs, CHOOSING):
        weights, scale = layer.host.weights.double(), layer.host.spec.scale
        given = weights.pre_tensor(layer.host.spec.rope)
        with located(layer.name):
            whitened, post = whiten(given, weights.post_pairs(), moments, scale, options.damping)
        pre = ordinary(whitened)
        if layer.rule.cache is not None and moments.rotations is not None and isinstance(whitened, RotaryPairs):
            spec = layer.host.spec
            width = layer.rule.cache * spec.head_dim * (spec.num_kv_heads or spec.num_heads)
            pre = unlifted_norm(best_fold(whitened, moments.rotations, even_rank(round(width))))
        unit = squared_norm(post) ** (1.0 if options.objective == "layer" else 0.5)
        yield layer, _divided(pre, unit / PRE_WEIGHT), _divided(post, unit)


def _divided(pairs: Pairs, unit: Tensor) -> Pairs:
    """Returns the tensor with its squared norm divided; a zero unit divides nothing."""
    return Pairs(pairs.left / torch.where(unit > 0, unit, 1.0).sqrt(), pairs.right)


def _exactly(name: str) -> str:
    """Returns a selection of this very module, whatever characters its name has."""
    return name if re.fullmatch(r"[\w.]*[A-Za-z_][\w.]*", name) else f"re:{re.escape(name)}"
