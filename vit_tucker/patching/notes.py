"""Remarks of a patch report: what a reader of the numbers should know besides."""

import gc
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from vit_tucker.attention.effective import user_hooks
from vit_tucker.attention.module import AttentionModule
from vit_tucker.attention.options import MethodConfig
from vit_tucker.conversion.inputs import reads_tokens
from vit_tucker.conversion.observe import WatchedLayer
from vit_tucker.hosts.readers import Host

CHOSEN_BY_WEIGHTS = "ranks chosen from the weights alone: patch chooses them by the calibration images"
RANDOM = (
    "the model's weights look freshly initialised (all of its norms are at their initial values): errors and ranks are those of "
    "random weights, which have no low-rank structure; start from trained ones (timm's pretrained=True, or weights of yours)"
)


def rotation_notes(hosts: Mapping[str, Host], layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Notes what becomes of a host's rotations (RoPE) where one latent key takes the place of the heads' own.

    Args:
        hosts, layers: what was there and what replaces it, by full module name.
    """
    widths = {name: m.latent_width for name, m in layers.items() if isinstance(m, AttentionModule)}
    cut = {name: width for name, width in widths.items() if width is not None and width < hosts[name].spec.kv_dim}
    if cut:
        full = sorted({hosts[name].spec.kv_dim for name in cut})
        return (
            f"latent RoPE: {len(cut)} layers rotate one latent key of width {in_words(sorted(set(cut.values())))} for all heads, "
            f"an approximation of the host's RoPE (exact from width {in_words(full)} on)",
        )
    if any(width is not None for width in widths.values()):
        return ("latent RoPE: the latent keys are as wide as all key heads together and keep their rotations exactly",)
    return ()


def token_notes(model: nn.Module, layers: Sequence[WatchedLayer]) -> tuple[str, ...]:
    """Notes what too few images do to moments, and so to whitened spectra, ranks and conversions.

    Args:
        model: whose inputs the moments are of.
        layers: with moments.
    """
    what = "sequence" if reads_tokens(model) else "image"
    short = [layer for layer in layers if layer.tokens <= layer.host.spec.embed_dim]
    if short:
        worst = max(short, key=lambda layer: layer.host.spec.embed_dim / max(layer.tokens, 1))
        columns = worst.host.spec.embed_dim
        images = -(-(columns + 1) * worst.images // max(worst.tokens, 1))
        seen = f"{worst.name}{f' (and {len(short) - 1} more)' if short[1:] else ''}"
        given = f"{worst.tokens} tokens of {_count(worst.images, what)} for {columns} columns"
        return (
            f"calibration: {seen}: {given}: whitened spectra end there, whatever the weights are; {columns + 1} tokens "
            f"are needed ({_count(images, what)})",
        )
    if any(layer.images == 1 for layer in layers):
        return (
            f"calibration: one {what}: its tokens are alike, so what is fitted to them may fit no other; "
            "give a hundred or more",
        )
    return ()


def folding_notes(
    config: MethodConfig, layers: Mapping[str, WatchedLayer], modules: Mapping[str, nn.Module]
) -> tuple[str, ...]:
    """Notes for which lengths of sequences folded rotations hold, where a language model's latent key is narrower than its keys.

    Args:
        config: of the patch.
        layers: with the tokens that they were calibrated on, by full module name.
        modules: what replaces them.
    """
    folds = config.fitted_to is not None and config.fitted_to.fold_rotations
    for name, module in modules.items():
        spec, width = layers[name].host.spec, module.latent_width if isinstance(module, AttentionModule) else None
        if folds and layers[name].images and width is not None and spec.causal and width < spec.kv_dim:
            length = layers[name].tokens // layers[name].images
            return (
                f"latent RoPE: rotations that sequences of {length} tokens can't tell apart share pairs of the latent keys: for "
                "longer contexts calibrate on longer sequences, or with fold_rotations=False",
            )
    return ()


def untrained_notes(model: nn.Module, config: MethodConfig) -> tuple[str, ...]:
    """Notes that weights to be converted are random ones, as far as that can be seen.

    Args:
        model: before its patch.
        config: of the patch.
    """
    return (RANDOM,) if config.init == "pretrained" and looks_untrained(model) else ()


def looks_untrained(model: nn.Module) -> bool:
    """Returns whether a model's weights are timm's initialisation, as far as its norms show: equal scales, zero shifts.

    Training moves these from the first step on. Without such norms, or on the meta device, nothing is known: False.
    """
    scales = [
        m for m in model.modules() if "norm" in type(m).__name__.lower() and is_vector(getattr(m, "weight", None))
    ]
    return bool(scales) and all(at_start(module) for module in scales)


def is_vector(value: Any) -> bool:
    """Returns whether something is a tensor of several values in one dimension, with values."""
    return isinstance(value, Tensor) and value.ndim == 1 and len(value) > 1 and not value.is_meta


def at_start(norm: nn.Module) -> bool:
    """Returns whether a norm's scales are all equal, and its shifts zero."""
    scale: Any = norm.weight
    shift: Any = getattr(norm, "bias", None)
    constant = bool((scale == scale[0]).all())
    return constant and (not isinstance(shift, Tensor) or not bool(shift.any()))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def weight_notes(hosts: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Notes what stood around the weights of replaced modules: adapters that are merged, hooks that are left.

    Args:
        hosts, modules: what is replaced, by full module name.
    """
    merged: dict[str, list[str]] = {}
    for name, host in hosts.items():
        for part, cls in host.merged.items():
            merged.setdefault(cls, []).append(f"{name}.{part}".rstrip("."))
    hooks = [hook for name, module in modules.items() for hook in hooks_of(name, module)]
    notes = []
    if merged:
        kinds = "; ".join(f"{cls} of {', '.join(names)}" for cls, names in merged.items())
        notes.append(f"merged into the new layers, which train as a whole where these did: {kinds}")
    if hooks:
        notes.append(f"not carried over: {', '.join(dict.fromkeys(hooks))}")
    return tuple(notes)


def hooks_of(name: str, module: nn.Module) -> Iterator[str]:
    """Returns every hook of users on a module, its parts and its parameters: 'forward hook of blocks.0.attn'."""
    for part_name, part in module.named_modules(prefix=name):
        for kind in user_hooks(part):
            yield f"{kind} of {part_name}"
    for parameter_name, parameter in module.named_parameters(prefix=name):
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            yield f"gradient hook of {parameter_name}"


def optimizer_notes(modules: Iterable[nn.Module]) -> tuple[str, ...]:
    """Notes which optimizers were made before the patch, and so train parameters that it replaces.

    Args:
        modules: to be replaced.
    """
    parameters = {id(p) for module in modules if _is_held_elsewhere(module) for p in module.parameters()}
    if not parameters:
        return ()
    alive = [thing for thing in gc.get_objects() if issubclass(type(thing), Optimizer)]
    names = {
        type(optimizer).__name__
        for optimizer in alive
        if not parameters.isdisjoint(id(p) for group in optimizer.param_groups for p in group["params"])
    }
    if not names:
        return ()
    return (
        f"an optimizer made before the patch ({', '.join(sorted(names))}) holds what is replaced and would never train the "
        "new ones: make it anew",
    )


def _is_held_elsewhere(module: nn.Module) -> bool:
    """Returns whether anything but the module refers to a parameter of it, by its count of references: a cheap first look."""
    usual, *_ = _reference_counts(nn.LayerNorm(1))  # which draws no random numbers
    return any(count > usual for count in _reference_counts(module))


def _reference_counts(module: nn.Module) -> list[int]:
    return [sys.getrefcount(parameter) for parameter in module.parameters()]


def in_words(numbers: Sequence[int]) -> str:
    """Writes rising numbers as '16', or as '16 to 48'."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
