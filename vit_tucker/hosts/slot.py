"""Slots: what can be replaced in a model. Attention is the first, ``nn.Linear`` the second; a model remembers one patch of each.

``patching`` knows no attention and no Linears: it finds, reads, counts and restores modules through these classes alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

from vit_tucker.attention.base import AttentionConfig
from vit_tucker.attention.module import AttentionModule
from vit_tucker.attention.options import MethodConfig, Selection
from vit_tucker.attention.registry import METHODS, MethodRegistry
from vit_tucker.attention.variants.gqa import GQAConfig
from vit_tucker.attention.variants.mha import MHAConfig
from vit_tucker.errors import ConfigError
from vit_tucker.hosts.families import family_of, read_host
from vit_tucker.hosts.find import find_attention, find_other_attention
from vit_tucker.hosts.linear import LinearHost, find_linear, read_linear
from vit_tucker.hosts.readers import Host
from vit_tucker.hosts.timm_classes import has_mixed_rope
from vit_tucker.hosts.tokens import Counter, counter
from vit_tucker.linear.base import LINEAR_METHODS, LinearConfig, LinearModule, LinearSpec
from vit_tucker.tensor.rotary import tensor_distance
from vit_tucker.tensor.tucker import relative_distance


class Slot(ABC):
    """What can be replaced in a model: how it is found, read, called and restored, and what its report says.

    Attributes:
        name: of the YAML's section, of the record, and of the ``slot=`` argument.
        noun: one of its modules, in messages.
        argument: of our architecture in timm's registry, under which a config.json has the patch.
        methods: the registry whose methods fit.
        layer: base class of what is put in.
        columns: errors of a layer's report by key, with their headings.
        legend: what these errors are.
    """

    name: ClassVar[str]
    noun: ClassVar[str]
    argument: ClassVar[str]
    methods: ClassVar[MethodRegistry[Any]]
    layer: ClassVar[type[nn.Module]]
    columns: ClassVar[Mapping[str, str]]
    legend: ClassVar[str]

    @abstractmethod
    def find(self, model: nn.Module, layers: Selection | None = None) -> dict[str, nn.Module]:
        """All modules of this kind by full name, in the model's order, replaced or not; ``layers``: what a config selects."""

    def left_alone(self, model: nn.Module) -> list[str]:
        """Full names of modules that look like this kind, but that no method replaces."""
        return []

    @abstractmethod
    def reader(self, model: nn.Module) -> Callable[[nn.Module], Any]:
        """What reads a module of this model: gives spec, weights and parameters, or raises PatchError without its name."""

    @abstractmethod
    def counter(self, host: Any) -> Counter:
        """What counts the tokens in a call of a module."""

    @abstractmethod
    def dense_flops(self, spec: Any, num_tokens: int) -> int:
        """Operations of the host's own module for N tokens."""

    @abstractmethod
    def errors(self, host: Any, layer: Any) -> dict[str, float]:
        """Relative errors of a converted layer, some of ``columns``."""

    def restore(self, original: nn.Module, current: nn.Module) -> None:  # noqa: B027
        """Make a host's module fit what has become of its replacement, before it is put back."""

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The replaced modules of a model by full name, a shared one under each of its names."""
        return {name: module for name, module in self.find(model).items() if isinstance(module, self.layer)}


class AttentionSlot(Slot):
    """Self-attention."""

    name, noun, argument = "attention", "attention module", "patch"
    methods, layer = METHODS, AttentionModule
    columns: ClassVar = {"pre_error": "error pre", "post_error": "error post", "output_error": "output error"}
    legend = "errors: relative, of the weight tensors and of the output on calibration tokens"

    def find(self, model: nn.Module, layers: Selection | None = None) -> dict[str, nn.Module]:
        """See base class."""
        return find_attention(model)

    def left_alone(self, model: nn.Module) -> list[str]:
        """See base class."""
        return find_other_attention(model)

    def reader(self, model: nn.Module) -> Callable[[nn.Module], Host]:
        """See base class."""
        mixed_rope = has_mixed_rope(model)
        return lambda module: read_host(module, mixed_rope)

    def counter(self, host: Host) -> Counter:
        """See base class."""
        return counter(host.spec.layout)

    def dense_flops(self, spec: Any, num_tokens: int) -> int:
        """See base class."""
        groups = spec.num_kv_heads
        dense: AttentionConfig = MHAConfig() if groups is None else GQAConfig(num_kv_heads=groups)
        return dense.count_flops(spec, num_tokens)

    def errors(self, host: Host, layer: AttentionModule) -> dict[str, float]:
        """See base class."""
        weights = host.weights.double()
        return {
            "pre_error": tensor_distance(weights.pre_tensor(host.spec.rope), layer.pre_tensor()).item(),
            "post_error": relative_distance(weights.post_pairs(), layer.post_pairs()).item(),
        }

    def restore(self, original: nn.Module, current: nn.Module) -> None:
        """See base class: timm's ``set_input_size`` resizes position biases."""
        family = family_of(original)
        if isinstance(current, AttentionModule) and current.position_bias is not None and family is not None:
            family.follow(original, current.position_bias)


class LinearSlot(Slot):
    """Linear layers outside of attention; heads where a config names them."""

    name, noun, argument = "linear", "linear layer", "linear_patch"
    methods, layer = LINEAR_METHODS, LinearModule
    columns: ClassVar = {"weight_error": "weight error"}
    legend = "errors: relative, of the weights"

    def find(self, model: nn.Module, layers: Selection | None = None) -> dict[str, nn.Module]:
        """See base class."""
        return find_linear(model, layers)

    def reader(self, model: nn.Module) -> Callable[[nn.Module], LinearHost]:
        """See base class."""
        return read_linear

    def counter(self, host: LinearHost) -> Counter:
        """See base class: a linear layer does not mix tokens, so that all of them are one sequence."""
        return lambda args, kwargs: (1, (args[0] if args else kwargs["input"]).numel() // host.spec.in_features)

    def dense_flops(self, spec: LinearSpec, num_tokens: int) -> int:
        """See base class."""
        return 2 * num_tokens * spec.in_features * spec.out_features

    def errors(self, host: LinearHost, layer: LinearModule) -> dict[str, float]:
        """See base class."""
        weight = host.weights.double().weight
        distance = (layer.dense_weights().weight - weight).norm() / weight.norm().clamp_min(1e-300)
        return {"weight_error": distance.item()}


ATTENTION, LINEAR = AttentionSlot(), LinearSlot()
SLOTS: dict[str, Slot] = {slot.name: slot for slot in (ATTENTION, LINEAR)}
"""All slots by name, in the order in which a run patches them."""


def slot_of(config: MethodConfig | type[MethodConfig]) -> Slot:
    """The slot that a config's class is of.

    Raises:
        ConfigError: of none.
    """
    cls = config if isinstance(config, type) else type(config)
    for slot in SLOTS.values():
        if issubclass(cls, slot.methods.base):
            return slot
    raise ConfigError(f"{cls.__name__} must derive from {AttentionConfig.__name__} or {LinearConfig.__name__}")


def get_slot(name: str) -> Slot:
    """The slot of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SLOTS:
        raise ConfigError(f"unknown slot '{name}', known: {', '.join(SLOTS)}")
    return SLOTS[name]
