"""Perplexity of a causal language model on a text, by windows with a stride."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vit_tucker.errors import ConfigError
from vit_tucker.inference.token_losses import scorer
from vit_tucker.show.progress_bars import progress_bar

WINDOW = 1024
"""Tokens of a window where none is given, or the positions that the model has, if these are fewer."""


@dataclass(frozen=True)
class Perplexity:
    """The scores of a language model on a text.

    Attributes:
        nll: sum of the negative log-likelihoods of the scored tokens, in nats.
        tokens: how many tokens were scored.
        window, stride: in tokens.
        text_bytes: of UTF-8 that the scored tokens stand for; None where they were not given.
    """

    nll: float
    tokens: int
    window: int
    stride: int
    text_bytes: int | None = None

    @property
    def loss(self) -> float:
        """Returns the mean negative log-likelihood, in nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """Returns ``exp(loss)``; infinity where that is beyond float64."""
        return math.exp(self.loss) if not self.loss > 709 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Returns bits per byte of text, which models with different tokenizers share; None without ``text_bytes``."""
        return self.nll / math.log(2) / self.text_bytes if self.text_bytes else None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON: None in place of what is not finite."""
        values = {
            "perplexity": self.perplexity,
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "nll": self.nll,
        }
        finite = {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
        counts = {"tokens": self.tokens, "text_bytes": self.text_bytes, "window": self.window, "stride": self.stride}
        return finite | counts


def perplexity(
    model: nn.Module,
    tokens: Tensor | Sequence[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    bos: int | None = None,
    token_bytes: Sequence[int] | None = None,
) -> Perplexity:
    """Computes the perplexity of a model on a text, as in Hugging Face's guide to perplexity.

    Windows of ``window`` tokens begin every ``stride`` tokens. Each scores the tokens that none before it has scored: all but the
    first window the last ``stride`` ones, each of which has at least ``window - stride`` tokens of context. A token at the
    beginning of its window has no context and is not scored: the first of the text, and of each window if the stride is as long;
    with ``bos`` all are.

    Logits are computed for a few tokens at a time, and only of scored ones, unless the model changes what its head returns
    (Gemma 2, Cohere); memory then grows with ``batch_size * window * vocabulary``.

    Args:
        model: causal language model of transformers, or any module whose output, or its ``logits``, is (B, N, V); patched or not.
            It stays on its device and in its dtype; log-likelihoods are in float32, sums in float64.
        tokens: ids of the text, (N) or (1, N), two at least.
        window: tokens of a forward pass, ``bos`` among them; 1024, or the model's positions if these are fewer, if None.
        stride: tokens from one window to the next, at most as many as a window holds, which is the value if None.
        batch_size: windows per forward pass.
        bos: id that begins each window and is not scored; none if None.
        token_bytes: bytes of text that each token stands for, N of them; for bits per byte.

    Raises:
        ConfigError: tokens, window or stride don't fit the model or each other.
    """
    ids = checked_tokens(tokens, model, bos)
    window = checked_window(window, model)
    room = window - (bos is not None)
    stride = room if stride is None else stride
    if not 1 <= stride <= room:
        raise ConfigError(f"stride {stride}: from 1 to {room}, the tokens of text in a window of {window}")
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size}: at least 1")
    if token_bytes is not None and len(token_bytes) != len(ids):
        raise ConfigError(f"token_bytes: {len(token_bytes)} numbers for {len(ids)} tokens")
    nll, scored = torch.zeros((), dtype=torch.float64), torch.zeros(len(ids), dtype=torch.bool)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with evaluating(model), progress_bar(total=len(ids), what="perplexity", unit="tokens") as bar:
        score = scorer(model, ids[:8].to(device)[None])
        for begins, size, new in batches(len(ids), room, stride, batch_size):
            inputs = torch.stack([ids[begin : begin + size] for begin in begins])
            if bos is not None:
                inputs = functional.pad(inputs, (1, 0), value=bos)
            known = max(inputs.shape[1] - new, 1)  # tokens at the start that are context alone
            nll += score(inputs.to(device), known)
            for begin in begins:
                scored[begin + size - (inputs.shape[1] - known) : begin + size] = True
            bar.update(len(begins) * new)
    text_bytes = None if token_bytes is None else int(torch.as_tensor(token_bytes)[scored].sum())
    return Perplexity(float(nll), int(scored.sum()), window, stride, text_bytes)


def batches(length: int, room: int, stride: int, batch_size: int) -> Iterator[tuple[list[int], int, int]]:
    """Yields windows over a text, those of equal sizes together.

    Args:
        length: tokens of the text.
        room: tokens of a window.
        stride: from one window to the next.
        batch_size: the most windows of one batch.

    Yields:
        Where the windows begin; how many tokens each has; how many at its end no window before it has.
    """
    begins, size, new = [0], min(room, length), min(room, length)
    end = size
    while end < length:
        following = begins[-1] + stride
        now, last = min(room, length - following), end
        end = following + now
        if (now, end - last) != (size, new) or len(begins) == batch_size:
            yield begins, size, new
            begins, size, new = [], now, end - last
        begins.append(following)
    yield begins, size, new


def checked_tokens(tokens: Tensor | Sequence[int], model: nn.Module, bos: int | None) -> Tensor:
    """Returns token ids on the CPU, in int64.

    Args:
        tokens: (N) or (1, N).
        model: whose vocabulary they must be of.
        bos: one more of them.

    Raises:
        ConfigError: they are no text for the model.
    """
    ids = torch.as_tensor(tokens).detach().cpu()
    ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ConfigError(
            f"tokens: whole numbers of shape (N), not {str(ids.dtype).removeprefix('torch.')} {tuple(ids.shape)}"
        )
    if len(ids) < 2:
        raise ConfigError(f"tokens: {len(ids)} of them; two at least, since the first has no context")
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    for name, values in (("tokens", ids), ("bos", ids if bos is None else torch.tensor([bos]))):
        low, high = int(values.min()), int(values.max())
        if low < 0 or (isinstance(size, int) and high >= size):
            allowed = f"0 to {size - 1}" if isinstance(size, int) else "0 and more"
            raise ConfigError(
                f"{name}: id {low if low < 0 else high}, but the model's vocabulary is {allowed}; is it of another model's "
                "tokenizer?"
            )
    return ids.long()


def checked_window(window: int | None, model: nn.Module) -> int:
    """Returns the tokens of a window; raises ConfigError if it can score none, or is longer than the model's positions."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if window is None:
        return min(WINDOW, positions) if isinstance(positions, int) else WINDOW
    if window < 2:
        raise ConfigError(f"window {window}: two tokens at least")
    if isinstance(positions, int) and window > positions:
        raise ConfigError(f"window {window}: the model has {positions} positions")
    return window


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Makes a context without gradients and with the model in evaluation mode, whose modules get their own modes back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
