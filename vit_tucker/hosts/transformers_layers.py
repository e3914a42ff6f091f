"""Layers of ours in transformers' decoders: they are called as the host's, keep its cache and give its maps.

A layer of ours in a decoder caches what its heads share: the latent key, rotated, and the latent value, in transformers' own
cache classes. No cached token is ever expanded to heads again. The layer's class derives from the method's and from the host's,
since transformers finds by class what to record.
"""

import importlib
import inspect
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vit_tucker.attention.call import Call
from vit_tucker.attention.decoding import attend_past
from vit_tucker.attention.effective import records_outputs
from vit_tucker.attention.host import HostSpec
from vit_tucker.attention.latent_layer import LatentModule
from vit_tucker.attention.module import AttentionModule
from vit_tucker.errors import PatchError
from vit_tucker.hosts.transformers_source import GPT2, llama_form

CACHES = ("cache", "past_key_values")
"""Names of the argument with the cache: transformers 5.24 renamed it."""
FLAGS = ("use_cache", "cache_position")
"""Arguments with a name like it that hold none."""
HOST_ATTRIBUTES = ("config", "layer_idx", "is_causal")
"""What the functions of transformers read of an attention module, beside what ``DecoderLayer`` defines."""


class DecoderLayer(AttentionModule):
    """Base of layers that stand in the place of a decoder's self-attention in transformers.

    Attributes:
        config: of the model; its ``_attn_implementation`` is read at each call, as transformers does.
        layer_idx: place in the cache.
        positional: names of the arguments of the host's forward, in order.
        eager: attention function of the host's file, for the implementation "eager".
        sliding_window: what the attention function gets under this name; None: nothing.
    """

    config: Any
    layer_idx: int
    positional: tuple[str, ...]
    eager: Callable[..., tuple[Tensor, Tensor | None]]
    sliding_window: int | None

    @property
    def num_key_value_groups(self) -> int:
        """Returns how many heads share a key, by the name that transformers' attention functions read."""
        return self.num_heads // (1 if isinstance(self, LatentModule) else cast(int, self.num_kv_heads))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Returns the output (B, N, O), and the maps (B, H, N, Nk) where the attention function makes them.

        Args:
            hidden_states: (B, N, C) tokens, the newest ones where there is a cache.
            *args, **kwargs: as of the host's forward: position_embeddings (cosines and sines, each (B or 1, N, D)),
                attention_mask in the form of the attention function, and a cache, which is updated.

        Raises:
            PatchError: tokens of another sequence to attend to, an unknown kind of cache.
        """
        kwargs |= zip(self.positional, args, strict=False)
        past = take_cache(kwargs)
        mask = kwargs.pop("attention_mask", None)
        rope = table_of(kwargs.pop("position_embeddings", None))
        q, k, v = self.project(hidden_states, rope)
        if past is not None:
            k, v = update(past, k, v, self.layer_idx, kwargs)
        y, maps = self.attend_by(q, k, v, mask, kwargs)
        return self.proj_drop(self.readout(self.combine(hidden_states, y))), maps

    def attend_by(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Attends by the model's attention function: "sdpa" by ``attend_past``, any other by transformers.

        Args:
            q: (B, H, N, Dk).
            k, v: (B, G, Nk, Dk), (B, G, Nk, Dv).
            mask: broadcasts to (B, H, N, Nk), in the form of the attention function; or None.
            kwargs: other arguments of the call.

        Returns:
            (B, H, N, Dv), and the maps or None.
        """
        name, dropout = self.config._attn_implementation, self.attn_drop.p if self.training else 0.0
        if name == "sdpa":
            causal = kwargs.get("is_causal")
            causal = self.spec.causal if causal is None else causal
            return attend_past(q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale, dropout=dropout), None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, self.eager)
        if self.sliding_window is not None:
            kwargs = {"sliding_window": self.sliding_window} | kwargs
        y, maps = attend(self, q, k, v, mask, dropout=dropout, scaling=self.scale, **kwargs)
        return y.transpose(1, 2), maps

    def hand_place_to(self, new: AttentionModule) -> None:
        """Makes another layer one of decoders too, in the place of this one; see ``AttentionModule.hand_place_to``."""
        for name in (*HOST_ATTRIBUTES, "eager", "positional", "sliding_window"):
            if name in vars(self):
                vars(new)[name] = vars(self)[name]
        new.__class__ = decoder_class(cast(Hashable, type(new)), cast(Hashable, type(self).__bases__[2]))
        hand_over(self, new)

    def __reduce__(self) -> tuple[Any, ...]:
        method, host = type(self).__bases__[1:]
        return new_layer, (method, host), self.__dict__


def table_of(embeddings: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """Returns cosines and sines of transformers, (B or 1, N, D) each, as a table (B, N, 2 D), see ``attention.rope``."""
    return None if embeddings is None else torch.cat([embeddings[1], embeddings[0]], -1)


def take_cache(kwargs: dict[str, Any]) -> Any:
    """Removes the cache from the arguments of a call and returns it; None without one.

    Raises:
        PatchError: tokens of another sequence, or something that may be a cache under an unknown name: a cache that stays empty
            gives wrong tokens without an error.
    """
    if kwargs.pop("encoder_hidden_states", None) is not None:
        raise PatchError("attention to another sequence (cross-attention) was asked of a layer of self-attention")
    given = [past for name in CACHES if (past := kwargs.pop(name, None)) is not None]
    other = [name for name, value in kwargs.items()
             if ("cache" in name or "past" in name) and name not in FLAGS and value is not None]  # fmt: skip
    if other:
        raise PatchError(f"'{other[0]}' may be a cache; layers of ours know it as {' or '.join(CACHES)}")
    if not given:
        return None
    return getattr(given[0], "self_attention_cache", given[0])


def update(past: Any, k: Tensor, v: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Adds the newest keys and values to a cache and returns all of them; what is both is cached once.

    Args:
        past: a cache of transformers.
        k, v: (B, G, N, Dk), (B, G, N, Dv); the same tensor where values are the keys.
        layer_idx: place in the cache.
        kwargs: other arguments of the call, which some caches read.
    """
    if v is not k:
        keys, values = past.update(k, v, layer_idx, kwargs=kwargs)
        return keys, values
    keys, _ = past.update(k, k[..., :0], layer_idx, kwargs=kwargs)
    return keys, keys


@cache
def decoder_class(method: Hashable, host: Hashable) -> type[DecoderLayer]:
    """Returns the class of a method's layers in the place of a host's class."""
    base = cast(type, method)
    return type(base.__name__, (DecoderLayer, base, cast(type, host)), {"__doc__": base.__doc__})


def new_layer(method: Hashable, host: Hashable) -> DecoderLayer:
    """Returns a layer without any state, for copies and pickles, whose classes are made anew by ``decoder_class``."""
    cls = decoder_class(method, host)
    return cls.__new__(cls)


def install(layer: AttentionModule, host: nn.Module) -> None:
    """Makes a converted layer one that stands in the place of a decoder's self-attention.

    Args:
        layer: of a method; its class is replaced.
        host: the module of transformers.

    Raises:
        PatchError: the method does not form keys and values by themselves, which a cache needs.
    """
    if type(layer).project is AttentionModule.project:
        raise PatchError(f"{type(layer).__name__} has no project(), so its keys and values can't be cached")
    for name in HOST_ATTRIBUTES:
        if hasattr(host, name):
            setattr(layer, name, getattr(host, name))
    vars(layer)["eager"] = importlib.import_module(type(host).__module__).eager_attention_forward
    vars(layer)["sliding_window"] = window_of(host)
    vars(layer)["positional"] = argument_names(cast(Hashable, type(host)))
    layer.__class__ = decoder_class(cast(Hashable, type(layer)), cast(Hashable, type(host)))
    hand_over(host, layer)


def window_of(host: Any) -> int | None:
    """Returns the window that a host's forward hands to its attention function, from the module or from its config."""
    place, name = type(host).__module__, type(host).__name__
    value = None if place == GPT2 else llama_form(place, name).window
    if value is None:
        return None
    window: int | None = getattr(host if value == "self.sliding_window" else host.config, "sliding_window", None)
    return window


def restore(host: nn.Module, layer: AttentionModule) -> None:
    """Gives a host's module the recording of outputs that transformers has set up since it was replaced."""
    hand_over(layer, host)


def hand_over(source: nn.Module, target: nn.Module) -> None:
    """Copies the hooks by which transformers records outputs: it sets them up once for a model, at its first call."""
    for hook in source._forward_hooks.values():
        if records_outputs(hook) and hook not in target._forward_hooks.values():
            target.register_forward_hook(hook)


@cache
def argument_names(host: Hashable) -> tuple[str, ...]:
    """Returns the names of the arguments of a host's forward that follow the tokens, in order."""
    parameters = inspect.signature(inspect.unwrap(cast(Any, host).forward)).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return tuple(names[2:])


def read_decoder_call(module: nn.Module, spec: HostSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Reads a call of a host's attention, without a cache.

    Args:
        module: the host's.
        spec: of it.
        args, kwargs: of the call.
    """
    names = ("hidden_states", *argument_names(cast(Hashable, type(module))))
    given = kwargs | dict(zip(names, args, strict=False))
    mask = given.get("attention_mask")
    rope = table_of(given.get("position_embeddings"))
    return Call(given["hidden_states"], mask, spec.causal and mask is None, rope, may_be_blind=mask is not None)
