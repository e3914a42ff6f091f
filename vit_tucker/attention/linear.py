"""Helpers on Linear layers that the variants share: weights as used in ``x @ W``, by heads, float64.

Weights are those that a Linear computes with: see ``vit_tucker.attention.effective`` for adapters and the like.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from vit_tucker.attention.contraction import is_plain
from vit_tucker.attention.effective import readable
from vit_tucker.errors import WeightsError
from vit_tucker.tensor.resize import orthonormal


def linear_weight(linear: nn.Module) -> Tensor:
    """Returns the weight of a Linear as used in ``x @ W``, (in, out), float64, detached.

    Args:
        linear: a Linear, or what a user put around one.
    """
    weight: Tensor = readable(linear).weight
    return weight.detach().double().mT


def called_weight(linear: nn.Module, like: Tensor) -> Tensor:
    """Returns the weight (out, in) of a Linear that is more than its weight, by calling it once on the identity.

    Args:
        linear: a Linear with adapters or the like, on its device.
        like: a tensor (any shape) of the dtype and device to compute with.
    """
    width: int = linear.in_features  # type: ignore[assignment]
    identity = torch.eye(width, dtype=like.dtype, device=like.device)
    rows = linear(torch.cat([identity.new_zeros(1, width), identity]))
    return (rows[1:] - rows[:1]).mT


def weight_of(linear: nn.Module, like: Tensor) -> Tensor:
    """Returns the live weight (out, in) of a Linear with what stands around it.

    Args:
        linear: a Linear, or what a user put around one.
        like: a tensor (any shape) of the dtype and device to compute with.
    """
    return linear.weight if isinstance(linear, nn.Linear) and is_plain(linear) else called_weight(linear, like)


def by_heads(x: Tensor, heads: int) -> Tensor:
    """Reshapes the rows of all heads into those of each.

    Args:
        x: (H*D, ...).
        heads: H.

    Returns:
        (H, D, ...).
    """
    return x.unflatten(0, (heads, -1))


def augmented_weight(linear: nn.Module) -> Tensor:
    """Returns the weight (in, out) of a Linear with its bias as a last row, float64.

    Args:
        linear: a Linear, or what a user put around one.
    """
    weight, bias = linear_weight(linear), linear_bias(linear)
    return weight if bias is None else torch.cat([weight, bias.unsqueeze(0)])


def linear_bias(linear: nn.Module) -> Tensor | None:
    """Returns the bias of a Linear, (out,), float64, detached, or None.

    Args:
        linear: a Linear, or what a user put around one.
    """
    bias: Tensor | None = readable(linear).bias
    return None if bias is None else bias.detach().double()


def head_weight(linear: nn.Module, num_heads: int) -> Tensor:
    """Returns the weight of a Linear by heads of its output, (num_heads, in, D), float64, detached.

    Args:
        linear: with num_heads * D outputs.
        num_heads: heads of its output.
    """
    return split_heads(linear_weight(linear), num_heads)


def head_bias(linear: nn.Module, num_heads: int, repeat: int = 1) -> Tensor | None:
    """Returns the bias of a Linear by heads, (num_heads * repeat, D), float64, detached, or None.

    Args:
        linear: with num_heads * D outputs.
        num_heads: heads of its output.
        repeat: how many times in a row each head is returned.
    """
    bias = linear_bias(linear)
    return None if bias is None else bias.unflatten(0, (num_heads, -1)).repeat_interleave(repeat, 0)


def set_linear(linear: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> None:
    """Copies a weight and a bias into a Linear.

    Args:
        linear: changed in place.
        weight: (in, out).
        bias: (out,); None sets a bias of the Linear to zero.
    """
    linear.weight.copy_(weight.mT)
    if linear.bias is not None:
        if bias is None:
            linear.bias.zero_()
        else:
            linear.bias.copy_(bias)


def set_augmented(linear: nn.Linear, weight: Tensor) -> None:
    """Copies a weight with its bias into a Linear, see ``augmented_weight``.

    Args:
        linear: changed in place.
        weight: (in, out), or (in + 1, out) with the bias as a last row.
    """
    width = linear.in_features
    set_linear(linear, weight[:width], weight[width] if len(weight) > width else None)


def orthonormalise_down(down: nn.Linear, *ups: nn.Linear, pairs: bool = False) -> None:
    """Rewrites a projection down with orthonormal columns, and those that read it so that their products stay.

    Args:
        down: into a latent; a bias of it counts as one more row.
        *ups: out of the latent.
        pairs: see ``orthonormal``.
    """
    factor, change = orthonormal(augmented_weight(down), pairs)
    if change is None:
        return
    set_augmented(down, factor)
    for up in ups:
        set_linear(up, change @ linear_weight(up), linear_bias(up))


def resize_linear(linear: nn.Linear, in_features: int, out_features: int) -> None:
    """Replaces the parameters of a Linear by ones of another size, without values; one of this size stays as it is.

    Args:
        linear: changed in place.
        in_features, out_features: the new size.
    """
    if (linear.in_features, linear.out_features) == (in_features, out_features):
        return
    linear.weight = resized(linear.weight, (out_features, in_features))
    if linear.bias is not None and linear.out_features != out_features:
        linear.bias = resized(linear.bias, (out_features,))
    linear.in_features, linear.out_features = in_features, out_features


def resized(parameter: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    """Returns the parameter, or one of another shape without values, with its dtype, device and requires_grad.

    Args:
        parameter: (...) of any shape.
        shape: the new one.
    """
    if isinstance(parameter, nn.Parameter) and parameter.shape == torch.Size(shape):
        return parameter
    return nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad)


@torch.no_grad()
def renewed(module: nn.Module, change: Callable[[], None]) -> dict[Tensor, Tensor]:
    """Changes a module's parameters, and returns new ones by the old ones (of any shape) whose place they took.

    Args:
        module: whose parameters change.
        change: does it; called without gradients.
    """
    before = dict(module.named_parameters())
    change()
    after = dict(module.named_parameters())
    return {old: after[key] for key, old in before.items() if after[key] is not old}


def init_linear(linear: nn.Linear, std: float) -> None:
    """Draws normal weights with standard deviation ``std`` and sets the bias to zero.

    Args:
        linear: changed in place.
        std: standard deviation of the weights.
    """
    nn.init.normal_(linear.weight, std=std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Reshapes (..., H*D) to (H, ..., D).

    Args:
        x: (..., H*D).
        num_heads: H.
    """
    return x.unflatten(-1, (num_heads, -1)).movedim(-2, 0)


def join_heads(x: Tensor) -> Tensor:
    """Reshapes (H, ..., D) to (..., H*D).

    Args:
        x: (H, ..., D).
    """
    return x.movedim(0, -2).flatten(-2)


@torch.no_grad()
def refuse_infinite(tensors: Iterable[tuple[str, Tensor | None]]) -> None:
    """Raises WeightsError for the first of named tensors with NaN or infinite values.

    Args:
        tensors: (name, tensor of any shape or None).
    """
    for name, tensor in tensors:
        if tensor is not None and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"its weights contain NaN or infinite values ({name.replace('_bias', ' bias')})")
