"""Slots: what can be replaced in a model. Attention is the first, ``nn.Linear`` the second; a model remembers one patch of each.

``patching`` knows no attention and no Linears: it finds, reads, counts and restores modules through slots alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from vit_tucker.attention.base import AttentionConfig
from vit_tucker.attention.host import HostSpec
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
from vit_tucker.hosts.tokens import Counter, counter
from vit_tucker.linear.base import LINEAR_METHODS, LinearConfig, LinearModule, LinearSpec
from vit_tucker.tensor.rotary import tensor_distance
from vit_tucker.tensor.tucker import relative_distance


@dataclass(frozen=True)
class Slot:
    """A kind of module that can be replaced: how it is found, read, called and restored, and what its report says.

    Attributes:
        name: of the YAML's section, of the record, and of the ``slot=`` argument.
        noun: one of its modules, in messages.
        argument: of our architecture in timm's registry, under which a config.json has the patch.
        methods: the registry whose methods fit.
        layer: base class of what is put in.
        columns: errors of a layer's report by key, with their headings.
        legend: what these errors are.
        find: finds all modules of this kind by full name, in the model's order, replaced or not; given what a config selects.
        find_others: finds what looks like this kind, but no method replaces.
        read: reads a module of a model into an object with the attributes of ``Host``, all but ``own``; or raises PatchError,
            whose message lacks the module's name.
        counter: makes what counts the tokens in a call of a module, from the host or the layer.
        dense_flops: counts the operations of the host's own module for N tokens.
        errors: measures a converted layer against its host: relative errors, some of ``columns``.
        restore: makes a host's module fit what has become of its replacement, before it is put back.
        install: gives a converted replacement what the callers of the host's module expect of it.
        cached: returns the numbers per token in the KV cache of a host or a layer; None without one.
    """

    name: str
    noun: str
    argument: str
    methods: MethodRegistry[Any]
    layer: type[nn.Module]
    columns: Mapping[str, str]
    legend: str
    find: Callable[[nn.Module, Selection | None], dict[str, nn.Module]]
    find_others: Callable[[nn.Module], list[str]]
    read: Callable[[nn.Module, nn.Module], Any]
    counter: Callable[[Any], Counter]
    dense_flops: Callable[[Any, int], int]
    errors: Callable[[Any, Any], dict[str, float]]
    restore: Callable[[nn.Module, nn.Module], None]
    install: Callable[[nn.Module, nn.Module], None] = lambda replacement, original: None
    cached: Callable[[Any], int | None] = lambda host: None

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """Returns the replaced modules of a model by full name, a shared one under each of its names."""
        return {name: module for name, module in self.find(model, None).items() if isinstance(module, self.layer)}


def attention_flops(spec: HostSpec, num_tokens: int) -> int:
    """Returns the operations of a host's attention, with the key/value heads that it has, for one sequence of N tokens."""
    groups = spec.num_kv_heads
    dense: AttentionConfig = MHAConfig() if groups is None else GQAConfig(num_kv_heads=groups)
    return dense.count_flops(spec, num_tokens)


def attention_errors(host: Host, layer: AttentionModule) -> dict[str, float]:
    """Returns the relative errors of both weight tensors of a converted layer."""
    weights = host.weights.double()
    return {
        "pre_error": tensor_distance(weights.pre_tensor(host.spec.rope), layer.pre_tensor()).item(),
        "post_error": relative_distance(weights.post_pairs(), layer.post_pairs()).item(),
    }


def restore_attention(original: nn.Module, current: nn.Module) -> None:
    """Makes a host's module fit what has become of its replacement, as its family does."""
    family = family_of(original)
    if isinstance(current, AttentionModule) and family is not None:
        family.restore(original, current)


def cached_numbers(host: Host | AttentionModule) -> int | None:
    """Returns the numbers per token in the KV cache of a decoder's host or layer; None for attention to later tokens too."""
    if not host.spec.causal:
        return None
    if isinstance(host, AttentionModule):
        return host.kv_width
    return 2 * (host.spec.num_kv_heads or host.spec.num_heads) * host.spec.head_dim


def install_attention(replacement: nn.Module, original: nn.Module) -> None:
    """Gives a replacement what the callers of the host's module expect of it, as its family does."""
    family = family_of(original)
    if isinstance(replacement, AttentionModule) and family is not None and family.install is not None:
        family.install(replacement, original)


ATTENTION = Slot(
    name="attention",
    noun="attention module",
    argument="patch",
    methods=METHODS,
    layer=AttentionModule,
    columns={"output_error": "output error", "pre_error": "error pre", "post_error": "error post"},
    legend="errors: relative, of the output on calibration tokens and of the weight tensors",
    find=lambda model, layers: find_attention(model),
    find_others=find_other_attention,
    read=read_host,
    counter=lambda host: counter(host.spec.layout),
    dense_flops=attention_flops,
    errors=attention_errors,
    restore=restore_attention,
    install=install_attention,
    cached=cached_numbers,
)
"""Self-attention."""


def linear_counter(host: LinearHost | LinearModule) -> Counter:
    """Returns what counts the tokens in a call: a linear layer does not mix them, so that all are one sequence."""
    return lambda args, kwargs: (1, (args[0] if args else kwargs["input"]).numel() // host.spec.in_features)


def linear_flops(spec: LinearSpec, num_tokens: int) -> int:
    """Returns the operations of a host's linear layer for N tokens."""
    return 2 * num_tokens * spec.in_features * spec.out_features


def linear_errors(host: LinearHost, layer: LinearModule) -> dict[str, float]:
    """Returns the relative error of a converted layer's weight."""
    weight = host.weights.double().weight
    distance = (layer.dense_weights().weight - weight).norm() / weight.norm().clamp_min(1e-300)
    return {"weight_error": distance.item()}


LINEAR = Slot(
    name="linear",
    noun="linear layer",
    argument="linear_patch",
    methods=LINEAR_METHODS,
    layer=LinearModule,
    columns={"output_error": "output error", "weight_error": "weight error"},
    legend="errors: relative, of the output on calibration tokens and of the weights",
    find=find_linear,
    find_others=lambda model: [],
    read=lambda module, model: read_linear(module),
    counter=linear_counter,
    dense_flops=linear_flops,
    errors=linear_errors,
    restore=lambda original, current: None,
)
"""Linear layers outside of attention; heads where a config names them."""
SLOTS = {slot.name: slot for slot in (ATTENTION, LINEAR)}
"""All slots by name, in the order in which a run patches them."""


def slot_of(config: MethodConfig | type[MethodConfig]) -> Slot:
    """Returns the slot that a config's class is of.

    Raises:
        ConfigError: of none.
    """
    cls = config if isinstance(config, type) else type(config)
    for slot in SLOTS.values():
        if issubclass(cls, slot.methods.base):
            return slot
    raise ConfigError(f"{cls.__name__} must derive from {AttentionConfig.__name__} or {LinearConfig.__name__}")


def get_slot(name: str) -> Slot:
    """Returns the slot of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SLOTS:
        raise ConfigError(f"unknown slot '{name}', known: {', '.join(SLOTS)}")
    return SLOTS[name]
