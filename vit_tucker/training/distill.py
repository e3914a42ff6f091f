"""Distillation from a frozen teacher: soft or hard targets, and the final tokens.

    (1 - alpha) * label loss + alpha * distillation loss + features * mean squared error of the final tokens
    soft: T^2 * KL(softmax(teacher / T) || softmax(student / T)), mean over images
    hard: cross-entropy with the teacher's label

Source: Hinton et al., arXiv 1503.02531; Touvron et al. (DeiT), arXiv 2012.12877. Hosts with a distillation token are trained as
DeiT trains them: the labels teach the class token's head, the teacher the distillation token's.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_tucker.config.train_section import DistillConfig
from vit_tucker.errors import ConfigError

Logits = Tensor | tuple[Tensor, Tensor]
"""(B, classes), or those of the class token and of the distillation token."""


def distillation_loss(
    student: Tensor, teacher: Tensor, kind: Literal["soft", "hard"], temperature: float = 1.0
) -> Tensor:
    """Computes the loss of the student's logits against the teacher's, mean over images.

    Args:
        student, teacher: logits, (B, classes).
        kind: soft or hard, see the module.
        temperature: T of the soft loss.
    """
    student, teacher = _full(student), _full(teacher)
    if kind == "hard":
        return F.cross_entropy(student, teacher.argmax(-1))
    log_student, log_teacher = (F.log_softmax(x / temperature, -1) for x in (student, teacher))
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


class Distiller:
    """Computes the loss of a student that also learns from a teacher, in place of the label loss.

        with distiller.observe():
            logits = model(images)
        loss = distiller(images, logits, targets, label_loss)

    Args:
        teacher: dense model on the student's device, is set to eval mode and frozen.
        config: the recipe's section.
        student: unwrapped; ``model`` above may be wrapped in DDP or compiled.
        autocast: makes the context in which the teacher runs, the student's own precision (``accelerator.autocast``).

    Attributes:
        parts: the last losses, unweighted and detached, for the log: "label", "distill", with tokens also "features".

    Raises:
        ConfigError: other classes or, for features, other tokens than the student's.
    """

    def __init__(
        self,
        teacher: nn.Module,
        config: DistillConfig,
        student: nn.Module,
        autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        _check(teacher, config, student)
        self.teacher = teacher.eval().requires_grad_(False)
        self.config = config
        self.student = student
        self.autocast = autocast
        self.parts: dict[str, Tensor] = {}
        self._student_tokens, self._teacher_tokens = FinalTokens(student), FinalTokens(teacher)
        if hasattr(student, "set_distilled_training"):  # then it returns both tokens' logits in training mode
            student.set_distilled_training(True)  # type: ignore[operator]

    def observe(self) -> AbstractContextManager[Any]:
        """Returns the context of the student's forward pass, which records its final tokens where they are compared."""
        return self._student_tokens if self.config.features else contextlib.nullcontext()

    def __call__(
        self, images: Tensor, logits: Logits, targets: Tensor, label_loss: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Computes the loss of a batch.

        Args:
            images: as the student saw them, mixed and augmented, (B, channels, height, width).
            logits: the student's.
            targets: what ``label_loss`` takes: labels (B,), or their mixture (B, classes).
            label_loss: logits, targets -> scalar mean.

        Returns:
            Scalar, differentiable.

        Raises:
            ConfigError: logits or tokens of another shape than the teacher's.
        """
        config = self.config
        by_label, by_teacher = (logits, logits) if isinstance(logits, Tensor) else logits
        with torch.no_grad(), self.autocast(), self._teacher_tokens:
            teacher_logits = self.teacher(images)
        if teacher_logits.shape != by_teacher.shape:
            raise _difference("distill", "logits", by_teacher, teacher_logits)
        label = label_loss(_full(by_label), targets)
        distill = distillation_loss(by_teacher, teacher_logits, config.kind, config.temperature)
        self.parts = {"label": label.detach(), "distill": distill.detach()}
        loss = (1 - config.alpha) * label + config.alpha * distill
        if config.features:
            features = token_loss(self._student_tokens.take(), self._teacher_tokens.take())
            self.parts["features"] = features.detach()
            loss = loss + config.features * features
        return loss


def token_loss(student: Any, teacher: Any) -> Tensor:
    """Computes the mean squared error of final tokens, outputs of ``forward_features``.

    Raises:
        ConfigError: not tensors of one shape.
    """
    if not isinstance(student, Tensor) or not isinstance(teacher, Tensor) or student.shape != teacher.shape:
        raise _difference("distill.features", "final tokens", student, teacher)
    return F.mse_loss(_full(student), _full(teacher))


class FinalTokens:
    """Records the output of a timm model's ``forward_features`` while it is entered as a context.

    The method is shadowed on the instance, and only within the context: keys of the state dict, copies (EMA) and other forward
    passes are as before, and DDP, activation checkpointing (which repeats blocks, not this method) and torch.compile see an
    ordinary call. It is one function for all steps, since torch.compile would compile anew for each new one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: list[Any] = []
        own: Any = model.forward_features
        found = self._found

        def noting(*args: Any, **options: Any) -> Any:
            tokens = own(*args, **options)
            found.append(tokens)
            return tokens

        self._noting = noting

    def __enter__(self) -> None:
        self._found.clear()
        self._model.__dict__["forward_features"] = self._noting

    def __exit__(self, *_: object) -> None:
        del self._model.__dict__["forward_features"]

    def take(self) -> Any:
        """Returns the tokens of the one forward pass, and forgets them."""
        (tokens,) = self._found
        self._found.clear()
        return tokens


def _full(x: Tensor) -> Tensor:
    """Returns logits or tokens in float32 at least, in which losses are computed."""
    return x if x.dtype == torch.float64 else x.float()


def _check(teacher: nn.Module, config: DistillConfig, student: nn.Module) -> None:
    """Raises ConfigError if the models differ in what can be known without running them."""
    if not hasattr(student, "forward_features") or not hasattr(teacher, "forward_features"):
        raise ConfigError("train.distill: works with timm's models, which have a forward_features")
    names = {"num_classes": "classes", **({"num_features": "token channels"} if config.features else {})}
    for attribute, what in names.items():
        mine, theirs = getattr(student, attribute, None), getattr(teacher, attribute, None)
        if mine != theirs and None not in (mine, theirs):
            raise ConfigError(f"train.distill: the teacher has {theirs} {what}, the student {mine}; they must agree")


def _difference(key: str, what: str, mine: Any, theirs: Any) -> ConfigError:
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}" for x in (mine, theirs)]
    return ConfigError(
        f"train.{key}: the student's {what} are {shapes[0]}, the teacher's {shapes[1]}; they must be tensors of one shape"
    )
