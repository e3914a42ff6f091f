"""Attention maps of a model, dense or patched, from one forward pass; the model is left as it was."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.checkpoint.save import unwrapped
from vit_tucker.conversion.observe import evaluating
from vit_tucker.errors import ExplainError
from vit_tucker.explain.grid import TokenGrid
from vit_tucker.explain.locate import CallSite, Shape, locate
from vit_tucker.explain.map_modules import MapModule, check_rows, choose_map_modules, heads_apart, layout_of, unfused
from vit_tucker.explain.token_mixing import find_token_mixers, is_pool
from vit_tucker.hosts.find import find_attention
from vit_tucker.patching.selection import Selection

Reduce = Callable[[str, Tensor, TokenGrid | None], Any]


@dataclass
class Recording:
    """Output, attention maps and places of tokens of one forward pass.

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
    """Returns the attention maps of all heads, after the softmax and before dropout.

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
    """Records attention maps and what a picture needs besides: the output, where the tokens lie, what else mixes them.

    Args:
        model, layers: see ``attention_maps``.
        images: (B, channels, height, width).
        reduce: called with (name, map, grid) as soon as a layer has run; its result is kept in place of the map.
        grad: record gradients, so that the output can be differentiated by the maps.

    Raises:
        ExplainError: see ``attention_maps``; or rows of a map that don't sum to 1, so that it is none.
    """
    model = unwrapped(model)
    found = find_attention(model)
    seen = choose_map_modules(found, layers)
    recording = Recording()
    plain = unfused(module for module, _ in seen.values())
    hooks = CaptureHooks(model, images, seen, recording, reduce)
    stance = (
        torch.compiler.set_stance
    )  # hooks need modules that run uncompiled; what was compiled before stays compiled
    with evaluating(model), plain, stance("force_eager"), torch.set_grad_enabled(grad), hooks:
        recording.output = model(images)
    missing = [name for name in seen if name not in recording.maps]
    if missing:
        kind = type(found[missing[0]]).__name__
        raise ExplainError(f"{missing[0]}: {kind} formed no attention map in the forward pass")
    return recording


class CaptureHooks:
    """Context with the hooks of one recording.

    Args:
        model, images, reduce: see ``record_attention``.
        seen: by full name of the layer.
        recording: is filled.
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
        self.mixers = find_token_mixers(model, self.names)

    def __enter__(self) -> None:
        for module, names in self.names.items():
            place = self.seen[names[0]][1]
            if place is getattr(module, "attn_drop", None):
                self.handles.append(place.register_forward_pre_hook(partial(self.add_map, module)))
            else:
                self.handles.append(place.register_forward_hook(partial(self.add_map, module)))
        around = {part for name in self.seen for part in (*self.around(name), self.modules[name])}
        for part in around:
            self.handles.append(part.register_forward_pre_hook(self.add_shape, with_kwargs=True))
        for name, mixer in self.mixers.items():
            self.handles.append(mixer.register_forward_pre_hook(partial(self.add_mixer, name)))

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def around(self, name: str) -> list[nn.Module]:
        """Returns the modules that contain a layer, the innermost first."""
        parts = name.split(".")
        return [self.modules[".".join(parts[:count])] for count in range(len(parts) - 1, -1, -1)]

    def add_shape(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Records the shape of a module's input; a forward pre-hook.

        Args:
            module: that is called.
            args, kwargs: of its call.
        """
        x = args[0] if args else next(iter(kwargs.values()), None)
        self.shapes[module] = tuple(x.shape) if isinstance(x, Tensor) else ()

    def add_mixer(self, name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Records that something else mixed tokens; a forward pre-hook.

        Args:
            name: full name of the module.
            _: the module, not used.
            args: of its call.
        """
        self.recording.events.append(("mixer", name))
        if is_pool(self.modules[name]) and args:
            self.recording.pooled[name] = args[0].detach()

    def add_map(self, module: nn.Module, _: nn.Module, args: tuple[Any, ...], output: Tensor | None = None) -> None:
        """Checks, locates, reduces and records a layer's map: the input of its dropout, or the output of its softmax.

        Args:
            module: the attention layer.
            _: the module that the hook is on, not used.
            args: of its call; the first is the map (S, H, n, n) before dropout.
            output: the map (S, H, n, n) of a softmax; None for a dropout.

        Raises:
            ExplainError: the layer ran twice, or its map is none.
        """
        attn = args[0] if output is None else output
        names = self.names[module]
        name = next((n for n in names if n not in self.recording.maps), None)
        if name is None:
            raise ExplainError(f"{names[0]}: ran more than once in one forward pass")
        attn = heads_apart(attn, module)
        check_rows(name, attn.detach())
        grid = locate(self.call_site(name, module, attn)) if attn.shape[-2] == attn.shape[-1] else None
        self.recording.events.append(("attention", name))
        self.recording.grids[name] = grid
        self.recording.maps[name] = attn if self.reduce is None else self.reduce(name, attn, grid)

    def call_site(self, name: str, module: nn.Module, attn: Tensor) -> CallSite:
        """Returns what is known of a layer's call.

        Args:
            name: full name of the layer.
            module: the layer.
            attn: its map, (S, H, n, n).
        """
        declared = getattr(self.model, "num_prefix_tokens", None)
        prefixes = list(dict.fromkeys([0 if declared is None else declared, 0, 1, 2]))
        around = [(part, self.shapes.get(part, ())) for part in self.around(name)]
        images, _, *size = self.images.shape
        counts, shape = (attn.shape[0] // images, attn.shape[-1]), self.shapes[module]
        return CallSite(name, *counts, shape, layout_of(module), around, prefixes, (size[0], size[1]))
