"""Relevance for one class: attention maps weighted by the class's gradients.

    A_l = mean over heads of max(0, dy/dA_l * A_l),   R = (I + A_L) ... (I + A_1)
Source: Chefer, Gur and Wolf, Generic Attention-model Explainability, arXiv 2103.15679, Eqs 5 and 6, for self-attention.
"""

import torch
from torch import Tensor, nn

from vit_tucker.errors import ExplainError
from vit_tucker.explain.capture import record_attention


def class_relevance(model: nn.Module, image: Tensor, target: int | None = None) -> dict[str, Tensor]:
    """Returns each layer's map for one class, all heads in one.

    All maps of all heads are in memory, with what their gradients need; gradients of parameters are neither computed nor changed.

    Args:
        model: a classifier of timm.
        image: (1, channels, height, width), as the model takes it.
        target: number of the class; the predicted one if None.

    Returns:
        By full name of the layer: (S, n, n), at least 0.

    Raises:
        ExplainError: see ``record_attention``; or the model has no such class.
    """
    image = image.detach().clone().requires_grad_()  # so that maps have gradients in a frozen model too
    recording = record_attention(model, image, grad=True)
    logits = recording.output
    if logits.ndim != 2 or not getattr(model, "num_classes", 1):
        raise ExplainError(f"relevance for a class: {type(model).__name__} has no classifier here")
    target = int(logits[0].argmax()) if target is None else target
    if not 0 <= target < logits.shape[1]:
        raise ExplainError(f"relevance for class {target}: the model has the classes 0 to {logits.shape[1] - 1}")
    maps = list(recording.maps.values())
    gradients = torch.autograd.grad(logits[0, target], maps, allow_unused=True)
    return {
        name: torch.zeros_like(attn[:, 0]).cpu() if g is None else weigh(attn.detach(), g).cpu()
        for (name, attn), g in zip(recording.maps.items(), gradients, strict=True)
    }


def weigh(attn: Tensor, gradient: Tensor) -> Tensor:
    """Returns the mean over heads of what speaks for the class, (S, n, n), float32.

    Args:
        attn, gradient: (S, H, n, n) maps and their gradients.
    """
    return (attn.float() * gradient.float()).clamp_min(0).mean(1)
