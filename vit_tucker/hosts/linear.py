"""Linear layers of models: which ones can be replaced, and what they compute."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from torch import Tensor, nn

from vit_tucker.attention.base import ParameterCount
from vit_tucker.attention.effective import full_name, is_adapter, readable
from vit_tucker.attention.linear import refuse_infinite
from vit_tucker.attention.module import AttentionModule
from vit_tucker.attention.options import Selection
from vit_tucker.errors import PatchError
from vit_tucker.hosts.find import find_attention, find_other_attention
from vit_tucker.hosts.images import pretrained_cfg
from vit_tucker.hosts.plain import is_same
from vit_tucker.linear.base import LinearModule, LinearSpec, LinearWeights
from vit_tucker.validation.patterns import by_pattern


@dataclass(frozen=True)
class LinearHost:
    """A linear layer of a model, read.

    Attributes:
        spec: its shape.
        weights: in its dtype; on the meta device they hold no data.
        parameters: what it has.
        merged: the class of what was merged into the weights, under the empty name; empty for a plain layer.
    """

    spec: LinearSpec
    weights: LinearWeights
    parameters: ParameterCount
    merged: Mapping[str, str] = field(default_factory=dict)

    @property
    def like(self) -> Tensor:
        """Returns a tensor whose device and dtype the replacement gets."""
        return self.weights.weight

    def refuse_not_finite(self) -> None:
        """Raises WeightsError for weights that are NaN or infinite."""
        refuse_infinite(vars(self.weights).items())


def find_linear(model: nn.Module, layers: Selection | None = None) -> dict[str, nn.Module]:
    """Finds linear layers by full name, in the model's order; a shared one under each of its names.

    These are all outside of attention but heads; heads by their full name; and what a pattern names that matches none of these:
    projections inside of the host's attention, and convolutions of one pixel.

    Args:
        model: any.
        layers: what a config selects.
    """
    items = [layers] if isinstance(layers, int | str) else list(layers or ())
    patterns = [item for item in items if isinstance(item, str)]
    usual, others = linear_names(model, patterns)
    chosen = {*usual, *(name for name in others if isinstance(model.get_submodule(name), LinearModule))}
    for item in patterns:
        with suppress(ValueError):  # no pattern, which the choice among what is found reports
            chosen |= set() if by_pattern(item, usual) else by_pattern(item, others)
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if name in chosen}


def linear_names(model: nn.Module, patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the names of the linear layers that a config finds anyway, and of those that it must name.

    Args:
        model: any.
        patterns: of a config: a head is found anyway if it is among them by its full name.
    """
    attention = find_attention(model)
    inside = tuple(f"{name}." for name in (*attention, *find_other_attention(model)))
    ours = [f"{name}." for name, module in attention.items() if isinstance(module, AttentionModule)]
    usual: list[str] = []
    others: list[str] = []
    heads = head_names(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or not is_linear(module) or name.startswith(tuple(ours)):
            continue
        ours.append(f"{name}.")  # parts of a layer of ours, or of an adapted one
        head = name.startswith(heads) and name not in patterns and not isinstance(module, LinearModule)
        if name.startswith(inside) or is_pointwise(module):
            others.append(name)
        elif not head:
            usual.append(name)
    return usual, others


def is_linear(module: nn.Module) -> bool:
    """Returns whether a module is a Linear, also one with PEFT's adapters around it, or stands in the place of one."""
    if is_adapter(module):
        base = getattr(module, "base_layer", getattr(module, "original_module", None))
        return isinstance(base, nn.Module) and is_linear(base)
    return isinstance(module, nn.Linear | LinearModule) or is_pointwise(module)


def is_pointwise(module: nn.Module) -> bool:
    """Returns whether a module is a plain convolution of one pixel: a linear layer of each pixel's channels."""
    return type(module) is nn.Conv2d and module.kernel_size == module.stride == (1, 1) and (
        module.groups == 1 and module.padding in ((0, 0), 0, "valid", "same"))  # fmt: skip


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Returns the full names of the classifier's modules, by timm's ``pretrained_cfg`` or ``get_classifier``; else 'head'."""
    named = pretrained_cfg(model).get("classifier")
    names = [named] if isinstance(named, str) else list(named or ())
    get = getattr(model, "get_classifier", None)
    own = get() if callable(get) else None
    parts = {id(part) for part in (own if isinstance(own, tuple | list) else [own]) if isinstance(part, nn.Module)}
    names += [name for name, module in model.named_modules() if name and id(module) in parts]
    return tuple(names) or ("head",)


def read_linear(module: nn.Module) -> LinearHost:
    """Reads a linear layer; adapters and parametrizations are merged.

    Raises:
        PatchError: it has been replaced already, or computes something else than its weights say; lacks the module's name.
    """
    if isinstance(module, LinearModule):
        raise PatchError(f"already patched ({type(module).__name__}); call vit_tucker.unpatch(model) first")
    plain = readable(module)
    weights = LinearWeights(plain.weight.flatten(1), plain.bias)
    out_features, in_features = weights.weight.shape
    bias = 0 if plain.bias is None else plain.bias.numel()
    merged = {} if is_same(plain, module) else {"": full_name(module)}
    spec = LinearSpec(in_features, out_features, plain.bias is not None, channels_first=is_pointwise(plain))
    return LinearHost(spec, weights, ParameterCount(plain.weight.numel(), bias), merged)
