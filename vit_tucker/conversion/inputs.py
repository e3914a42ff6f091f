"""Runs models on batches of images or of token sequences, and finds the features that they make of them."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vit_tucker.errors import PatchError

OWN_MASKS = ("sdpa", "eager")
"""Attention functions of transformers whose masks are tensors that others can read."""


class InputBatch(Protocol):
    """A batch of a model's inputs, on its device.

    Attributes:
        valid: which tokens of a sequence count, (B, N), boolean; None: all that the model makes of its inputs.
    """

    @property
    def valid(self) -> Tensor | None:
        """Returns which tokens of each sequence count."""

    def __len__(self) -> int:
        """Returns the number of images or sequences."""

    def features(self, model: Any) -> list[Tensor]:
        """Returns the features before the model's head."""

    def logits(self, model: Any) -> Tensor:
        """Returns scores of the classes, or of the next token at each one, (..., classes)."""


@dataclass(frozen=True)
class Images:
    """A batch of images for a model.

    Attributes:
        pixels: (B, channels, height, width), in the model's dtype.
        valid: None, since all tokens count.
    """

    pixels: Tensor
    valid: None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def features(self, model: Any) -> list[Tensor]:
        """Returns timm's forward_features of a model, else its outputs: all maps of a model of features."""
        forward = getattr(model, "forward_features", model)
        parts = tree_leaves(forward(self.pixels))
        return [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]

    def logits(self, model: Any) -> Tensor:
        """Returns the model's scores of classes, (B, classes); raises PatchError where its output is something else."""
        output = model(self.pixels)
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise PatchError(
                f"calibration: objective='likelihood' needs scores of classes, which {type(model).__name__} lacks"
            )
        return output


@dataclass(frozen=True)
class Tokens:
    """A batch of token sequences of one length, padded where they are shorter.

    Attributes:
        ids: (B, N), int64.
        attention_mask: (B, N), boolean, False for padding; None without any.
    """

    ids: Tensor
    attention_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def valid(self) -> Tensor | None:
        """Returns which tokens count: all but padding."""
        return self.attention_mask

    def features(self, model: Any) -> list[Tensor]:
        """Returns the last hidden state of the model without its head, (B, N, C): no logits are computed."""
        base = getattr(model, getattr(model, "base_model_prefix", ""), model)
        return [self._run(model, base).last_hidden_state]

    def logits(self, model: Any) -> Tensor:
        """Returns the scores of the next token at each one, (B, N, vocabulary); raises PatchError for a model without a head."""
        logits = getattr(self._run(model, model), "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            raise PatchError(
                f"calibration: objective='likelihood' needs scores of tokens, which {type(model).__name__} lacks"
            )
        return logits

    def _run(self, model: Any, part: Any) -> Any:
        padding = {}
        if self.attention_mask is not None:
            padding["attention_mask"] = self.attention_mask.long()
            if (
                "position_ids" in inspect.signature(part.forward).parameters
            ):  # counted without padding, as generate does
                padding["position_ids"] = (padding["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        with readable_masks(model):
            return part(input_ids=self.ids, **padding, use_cache=False)


def reads_tokens(model: nn.Module) -> bool:
    """Returns whether a model is one of transformers, which read tokens; all others read images."""
    return any(cls.__module__.partition(".")[0] == "transformers" for cls in type(model).__mro__)


@contextmanager
def readable_masks(model: Any) -> Iterator[None]:
    """Has a model of transformers attend by "sdpa" where its own function's masks are no plain tensors (flex, flash)."""
    config = model.config
    before = config._attn_implementation
    if before not in OWN_MASKS:
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        if before not in OWN_MASKS:
            config._attn_implementation = before
