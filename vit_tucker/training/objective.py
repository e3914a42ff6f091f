"""Defines what is minimised: the loss of a batch, and penalties of the model itself.

loss of the labels, or with a teacher see ``vit_tucker.training.distill``  +  sum of weight * penalty(model)
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vit_tucker.config.registries import PENALTIES
from vit_tucker.errors import ConfigError, shorten
from vit_tucker.training.distill import Distiller

Penalty = Callable[[nn.Module], Tensor]
"""The bare model -> a scalar, differentiable in its parameters."""


def register_penalty(name: str) -> Callable[[Penalty], Penalty]:
    """Makes a function available as ``train.penalties: {name: weight}``, as a decorator.

    Args:
        name: letters, digits and _; not label, distill or features.

    Returns:
        The decorator; it gives the function back as it is. The function takes the bare model (without DDP's wrapper) and returns
        a scalar; it is computed once per optimizer step, in the parameters' own precision.

    Raises:
        ConfigError: another function has that name.
    """

    def register(penalty: Penalty) -> Penalty:
        PENALTIES.add(name, penalty)
        return penalty

    return register


def named_penalties(weights: Mapping[str, float]) -> dict[str, tuple[float, Penalty]]:
    """Returns the registered penalties of a config's ``train.penalties``, with their weights.

    Raises:
        ConfigError: unknown name.
    """
    return {name: (weight, PENALTIES.get(name)) for name, weight in weights.items()}


class Loss(NamedTuple):
    """A loss and the terms that it consists of.

    Attributes:
        total: what is minimised, scalar.
        terms: its parts by name, unweighted, detached scalars.
    """

    total: Tensor
    terms: dict[str, Tensor]


class Objective:
    """Computes what a run minimises, and its terms by name: label; distill and features of a teacher; each penalty.

    Args:
        label_loss: logits (B, classes), targets -> scalar mean.
        distiller: the loss where a teacher is learned from, or None.
        penalties: weight and function by name. One of weight 0 is only logged: it changes no gradient.
        logits: model, batch -> its logits, see ``vit_tucker.training.task``; what the model returns if left out.
    """

    def __init__(
        self,
        label_loss: Callable[[Tensor, Tensor], Tensor],
        distiller: Distiller | None = None,
        penalties: Mapping[str, tuple[float, Penalty]] | None = None,
        logits: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__,
    ) -> None:
        self.label_loss, self.distiller, self.penalties = label_loss, distiller, dict(penalties or {})
        self.logits = logits

    def of_batch(self, model: nn.Module, images: Tensor, targets: Tensor) -> Loss:
        """Computes the loss of a micro-batch.

        Args:
            model: as it trains, wrapped or compiled.
            images: (B, channels, height, width), or tokens (B, N).
            targets: labels (B,), or their mixture (B, classes); of tokens those that follow, (B, N).
        """
        if self.distiller is None:
            total = self.label_loss(self.logits(model, images).float(), targets)
            return Loss(total, {"label": total.detach()})
        with self.distiller.observe():
            logits = model(images)
        total = self.distiller(images, logits, targets, self.label_loss)
        return Loss(total, self.distiller.parts)

    def with_penalties(self, loss: Tensor, bare: nn.Module) -> Loss:
        """Adds the weighted penalties of the model to a loss, for one backward pass; the terms are the penalties alone.

        Args:
            loss: () scalar.
            bare: without wrappers; its parameters are those that train.

        Raises:
            ConfigError: a penalty is no scalar tensor.
        """
        terms = {}
        for name, (weight, penalty) in self.penalties.items():
            with torch.set_grad_enabled(weight != 0):
                value = penalty(bare)
            if not isinstance(value, Tensor) or value.numel() != 1:
                found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise ConfigError(f"train.penalties.{name}: must return a scalar tensor, not {found}")
            value = value.reshape(())
            terms[name] = value.detach().to(loss.device)
            if weight != 0:
                loss = loss + weight * value.to(loss.device)
        return Loss(loss, terms)

    @torch.no_grad()
    def check(self, bare: nn.Module) -> None:
        """Computes each penalty once, so that a mistake in one is known before any training.

        Args:
            bare: the model without wrappers.

        Raises:
            ConfigError: one fails, is no scalar tensor, or is not finite.
        """
        device = next(bare.parameters()).device
        for name, entry in self.penalties.items():
            try:
                _, terms = Objective(self.label_loss, None, {name: entry}).with_penalties(
                    torch.zeros((), device=device), bare
                )
            except ConfigError:
                raise
            except Exception as error:  # of the user's own function
                reason = shorten(f"{type(error).__name__}: {error}", 300)
                raise ConfigError(f"train.penalties.{name}: {reason}") from error
            if not torch.isfinite(terms[name]):
                raise ConfigError(f"train.penalties.{name}: is {float(terms[name])} for the model as it starts")
