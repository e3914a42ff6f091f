"""Defines what a run learns: how a model is called with a batch, what its loss is, and how well it does.

The engine is the same for all tasks; how a task's models and data are built is in ``vit_tucker.run.builders``.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_tucker.errors import ConfigError
from vit_tucker.show.measures import IMAGE_MEASURES, TOKEN_MEASURES, Measure
from vit_tucker.training.metrics import (
    Scores,
    TokenScores,
    batch_sums,
    scores_from_sums,
    token_losses,
    token_scores,
    token_sums,
)
from vit_tucker.training.pictures import prediction_figure


class ImageTask:
    """Learns the labels of images.

    Args:
        input_size: channels, height, width.
        mean, std: of the normalisation, for pictures.
        name: of the model, for messages.

    Attributes:
        samples: what a batch consists of, in the plural.
        unit: what is counted in scores and rates.
        measures: what is measured; the first one decides which weights are best.
        num_sums: numbers that ``sums`` returns.
        draws: whether ``picture`` draws something.
        units: of a sample.
    """

    samples: ClassVar[str] = "images"
    unit: ClassVar[str] = "images"
    measures: ClassVar[tuple[Measure, ...]] = IMAGE_MEASURES
    num_sums: ClassVar[int] = 4
    draws: ClassVar[bool] = True
    units: int = 1

    def __init__(
        self, input_size: tuple[int, int, int], mean: Sequence[float] = (), std: Sequence[float] = (), name: str = ""
    ) -> None:
        self.input_size, self.mean, self.std, self.name = input_size, mean, std, name

    def example(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns images (count, channels, height, width) and labels (count,) without meaning, on the CPU."""
        return torch.zeros(count, *self.input_size), torch.zeros(count, dtype=torch.long)

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Returns the logits (B, classes) of a model, wrapped or not, for images (B, channels, height, width)."""
        logits: Tensor = model(inputs)
        return logits

    def label_loss(self, smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
        """Returns the loss: logits (B, classes), labels (B,) or their mixture (B, classes) -> scalar mean."""
        return nn.CrossEntropyLoss(label_smoothing=smoothing)

    def sums(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns what scores are made of, (num_sums,) float64, which adds up over batches and processes.

        Args:
            logits: (B, classes).
            targets: labels (B,).
        """
        return batch_sums(logits, targets)

    def scores(self, sums: Tensor) -> Scores:
        """Returns the scores of sums (num_sums,) over all processes; raises ValueError for no images."""
        return scores_from_sums(sums)

    def picture(self, inputs: Tensor, targets: Tensor, logits: Tensor) -> Tensor | None:
        """Returns some images with their predictions for TensorBoard, (3, H, W) uint8.

        Args:
            inputs: images (B, channels, height, width).
            targets: labels (B,).
            logits: (B, classes).
        """
        return prediction_figure(inputs, targets, logits, self.mean, self.std)

    def recompute(self, model: nn.Module) -> None:
        """Makes the blocks recompute their activations in the backward pass; raises ConfigError where timm's model can't."""
        try:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError):
            raise ConfigError(f"train.grad_checkpointing: timm's {self.name} has none") from None


class TokenTask:
    """Learns the next token of text, at each place of a window; arguments and attributes beside these as of ``ImageTask``.

    Args:
        block: tokens of a window, N.
        bytes_per_token: of the evaluated text, None where it is not known.
        name: of the model, for messages.
    """

    samples: ClassVar[str] = "windows"
    unit: ClassVar[str] = "tokens"
    measures: ClassVar[tuple[Measure, ...]] = TOKEN_MEASURES
    num_sums: ClassVar[int] = 2
    draws: ClassVar[bool] = False

    def __init__(self, block: int, bytes_per_token: float | None = None, name: str = "") -> None:
        self.block = self.units = block
        self.bytes_per_token, self.name = bytes_per_token, name

    def example(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns tokens and those that follow, (count, N) int64, all of them 0, on the CPU."""
        tokens = torch.zeros(count, self.block, dtype=torch.long)
        return tokens, tokens

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Returns the logits (B, N, vocabulary) of a causal model of transformers for tokens (B, N), without a cache."""
        logits: Tensor = model(input_ids=inputs, use_cache=False).logits
        return logits

    def label_loss(self, smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
        """Returns the loss: logits (B, N, vocabulary), tokens (B, N) -> scalar mean over tokens."""

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=smoothing)

        return loss

    def sums(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns what scores are made of, (num_sums,) float64.

        Args:
            logits: (B, N, vocabulary).
            targets: tokens that follow, (B, N); IGNORED ones don't count.
        """
        return token_sums(token_losses(logits, targets), targets)

    def scores(self, sums: Tensor) -> TokenScores:
        """Returns the scores of ``sums`` (num_sums,) over all processes; raises ValueError for no tokens."""
        return token_scores(sums, self.bytes_per_token)

    def picture(self, inputs: Tensor, targets: Tensor, logits: Tensor) -> Tensor | None:
        """Returns None, since there is nothing to draw.

        Args:
            inputs: tokens (B, N).
            targets: those that follow, (B, N).
            logits: (B, N, vocabulary).
        """

    def recompute(self, model: nn.Module) -> None:
        """Makes the blocks recompute their activations in the backward pass; raises ConfigError where the model can't."""
        names = (
            "activation_checkpointing_enable",
            "gradient_checkpointing_enable",
        )  # the second one in older transformers
        enable: Any = next((getattr(model, name) for name in names if hasattr(model, name)), None)
        try:
            enable({"use_reentrant": False})
        except (TypeError, ValueError):
            raise ConfigError(f"train.grad_checkpointing: {self.name} has none") from None


Task = ImageTask | TokenTask
"""What a run learns."""
