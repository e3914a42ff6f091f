"""Linear layers of models: which ones can be replaced, and what they compute."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from vit_tucker.attention.base import ParameterCount
from vit_tucker.attention.effective import full_name, is_adapter, readable
from vit_tucker.attention.linear import refuse_infinite
from vit_tucker.attention.options import Selection
from vit_tucker.errors import PatchError
from vit_tucker.hosts.find import find_attention, find_other_attention
from vit_tucker.hosts.images import pretrained_cfg
from vit_tucker.hosts.plain import is_same
from vit_tucker.linear.base import LinearModule, LinearSpec, LinearWeights


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
    """Finds all linear layers outside of attention by full name, in the model's order; a shared one under each of its names.

    Args:
        model: any.
        layers: what a config selects: a head is found only if it is in here by its full name.
    """
    items = [layers] if isinstance(layers, int | str) else list(layers or ())
    inside = [f"{name}." for name in (*find_attention(model), *find_other_attention(model))]
    found: dict[str, nn.Module] = {}
    heads = head_names(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(tuple(inside)) or not is_linear(module):
            continue
        inside.append(f"{name}.")  # parts of a layer of ours, or of an adapted one
        if name and (isinstance(module, LinearModule) or name in items or not name.startswith(heads)):
            found[name] = module
    return found


def is_linear(module: nn.Module) -> bool:
    """Returns whether a module is a Linear, also one with PEFT's adapters around it, or stands in the place of one."""
    if is_adapter(module):
        base = getattr(module, "base_layer", getattr(module, "original_module", None))
        return isinstance(base, nn.Module) and is_linear(base)
    return isinstance(module, nn.Linear | LinearModule)


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
    weights = LinearWeights(plain.weight, plain.bias)
    out_features, in_features = plain.weight.shape
    bias = 0 if plain.bias is None else plain.bias.numel()
    merged = {} if is_same(plain, module) else {"": full_name(module)}
    spec = LinearSpec(in_features, out_features, plain.bias is not None)
    return LinearHost(spec, weights, ParameterCount(plain.weight.numel(), bias), merged)
