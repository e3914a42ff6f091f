"""Attention maps of a model, dense or patched, from one forward pass; the model is left as it was."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.checkpoint.save import unwrapped
from vit_tucker.conversion.observe import evaluating
from vit_tucker.errors import ExplainError
from vit_tucker.explain.grid import TokenGrid
from vit_tucker.explain.locate import CallSite, Shape, locate
from vit_tucker.explain.map_modules import (
    MapModule,
    check_rows,
    choose_map_modules,
    eager,
    heads_apart,
    layout_of,
    unfused,
)
from vit_tucker.explain.token_mixing import find_token_mixers, is_pool
from vit_tucker.hosts.find import find_attention
from vit_tucker.patching.selection import Selection

Reduce = Callable[[str, Tensor, TokenGrid | None], Any]


@dataclass
class Recording:
    """What one forward pass showed.

    Attributes:
        output: of the model.
        maps: by full name of the layer, in the order of the calls: (B * S, H, n, n) for S sequences of n tokens per image, each
            row a distribution over keys; or what ``reduce`` made of it.
        grids: where the layer's tokens lie; None where that can't be known.
        events: ("attention" | "mixer", full name) in the order of the calls: mixers are what else moves information between
            tokens (convolutions, pooling, attention that no method replaces).
        pooled: input (B, N, C) of the attention pooling that reads the tokens out, by the module's full name; empty without one.
    """

    output: Any = None
    maps: dict[str, Any] = field(default_factory=dict)
    grids: dict[str, TokenGrid | None] = field(default_factory=dict)
    events: list[tuple[str, str]] = field(default_factory=list)
    pooled: dict[str, Tensor] = field(default_factory=dict)


def attention_maps(model: nn.Module, images: Tensor, layers: Selection | None = None) -> dict[str, Tensor]:
    """The attention maps of all heads, after the softmax and before dropout.

    Works for dense layers of timm and for all methods of ours. The pass runs in eval mode without gradients, with plain
    products in place of fused kernels; modes and switches are restored, also after an error. All maps together take
    ``B * H * N^2`` numbers per layer: choose layers, or reduce them on the fly with ``record_attention``.

    Args:
        model: a timm model, patched or not; compiled or wrapped ones are run as they are underneath.
        images: (B, channels, height, width), as the model takes them, on its device.
        layers: which attention layers, as for ``patch``; all that show their maps if None.

    Returns:
        By full name of the layer, in the order of the calls: (B, H, N, N), softmax(Q_i K^T / sqrt(D)) with its masks and
        biases, in the model's dtype. Layers that attend within windows give (B * windows, H, n, n), the windows of an image
        together.

    Raises:
        ExplainError: no attention layer shows its maps, or a chosen one does not. PatchError: the selection matches nothing.
    """
    return record_attention(model, images, layers).maps


def record_attention(
    model: nn.Module, images: Tensor, layers: Selection | None = None, reduce: Reduce | None = None, grad: bool = False
) -> Recording:
    """``attention_maps`` with all that a picture needs besides: the output, the places of the tokens, what else mixes them.

    Args:
        model: see ``attention_maps``.
        images: (B, channels, height, width).
        layers: see ``attention_maps``.
        reduce: called with (name, map, grid) as soon as a layer has run; its result is kept in place of the map.
        grad: record gradients, so that the output can be differentiated by the maps.

    Raises:
        ExplainError: see ``attention_maps``; or rows of a map that don't sum to 1, so that it is none.
    """
    model = unwrapped(model)
    found = find_attention(model)
    seen = choose_map_modules(found, layers)
    recording = Recording()
    watch = Watch(model, images, seen, recording, reduce)
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(unfused(module for module, _ in seen.values()))
        stack.enter_context(eager())
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.callback(watch.remove)
        watch.start()
        recording.output = model(images)
    missing = [name for name in seen if name not in recording.maps]
    if missing:
        kind = type(found[missing[0]]).__name__
        raise ExplainError(f"{missing[0]}: {kind} formed no attention map in the forward pass")
    return recording


class Watch:
    """The hooks of one recording.

    Args:
        model, images: of the pass.
        seen: by full name of the layer.
        recording: filled.
        reduce: see ``record_attention``.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, seen: dict[str, MapModule], recording: Recording, reduce: Reduce | None
    ) -> None:
        self.model, self.images, self.seen, self.recording, self.reduce = model, images, seen, recording, reduce
        self.handles: list[Any] = []
        self.shapes: dict[nn.Module, Shape] = {}
        self.names: dict[nn.Module, list[str]] = {}
        for name, (module, _) in seen.items():
            self.names.setdefault(module, []).append(name)
        self.modules = dict(model.named_modules(remove_duplicate=False))

    def start(self) -> None:
        """Register all hooks."""
        for module, names in self.names.items():
            place = self.seen[names[0]][1]
            if place is getattr(module, "attn_drop", None):
                hook = lambda _, args, module=module: self.see(module, args[0])  # noqa: E731
                self.handles.append(place.register_forward_pre_hook(hook))
            else:
                after = lambda _, args, output, module=module: self.see(module, output)  # noqa: E731
                self.handles.append(place.register_forward_hook(after))
        around = {part for name in self.seen for part in (*self.around(name), self.modules[name])}
        for part in around:
            self.handles.append(part.register_forward_pre_hook(self.note_shape, with_kwargs=True))
        for name, mixer in find_token_mixers(self.model, self.names).items():
            hook = lambda _, args, name=name: self.note_mixer(name, args)  # noqa: E731
            self.handles.append(mixer.register_forward_pre_hook(hook))

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self.handles:
            handle.remove()

    def around(self, name: str) -> list[nn.Module]:
        """The modules that hold a layer, the nearest first."""
        parts = name.split(".")
        return [self.modules[".".join(parts[:count])] for count in range(len(parts) - 1, -1, -1)]

    def note_shape(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the shape of a module's input."""
        x = args[0] if args else next(iter(kwargs.values()), None)
        self.shapes[module] = tuple(x.shape) if isinstance(x, Tensor) else ()

    def note_mixer(self, name: str, args: tuple[Any, ...]) -> None:
        """Remember that something else mixed tokens."""
        self.recording.events.append(("mixer", name))
        if is_pool(self.modules[name]) and args:
            self.recording.pooled[name] = args[0].detach()

    def see(self, module: nn.Module, attn: Tensor) -> None:
        """A layer's map: checked, located, reduced, kept."""
        names = self.names[module]
        name = next((n for n in names if n not in self.recording.maps), None)
        if name is None:
            raise ExplainError(f"{names[0]}: ran more than once in one forward pass")
        attn = heads_apart(attn, module)
        check_rows(name, attn.detach())
        grid = locate(self.place(name, module, attn)) if attn.shape[-2] == attn.shape[-1] else None
        self.recording.events.append(("attention", name))
        self.recording.grids[name] = grid
        self.recording.maps[name] = attn if self.reduce is None else self.reduce(name, attn, grid)

    def place(self, name: str, module: nn.Module, attn: Tensor) -> CallSite:
        """What is known of the call."""
        declared = getattr(self.model, "num_prefix_tokens", None)
        return CallSite(
            name=name,
            sequences=attn.shape[0] // self.images.shape[0],
            tokens=attn.shape[-1],
            shape=self.shapes[module],
            layout=layout_of(module),
            around=[(part, self.shapes.get(part, ())) for part in self.around(name)],
            prefixes=list(dict.fromkeys([0 if declared is None else declared, 0, 1, 2])),
            image=(self.images.shape[-2], self.images.shape[-1]),
        )
