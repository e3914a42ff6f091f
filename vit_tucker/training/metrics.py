"""Sums over images or tokens that add up exactly over batches and processes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Scores:
    """The scores of one model on one set.

    Attributes:
        loss: mean cross-entropy.
        top1, top5: accuracy in percent (top5 is top-k for fewer than 5 classes).
        count: images counted.
    """

    loss: float
    top1: float
    top5: float
    count: int


def batch_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums the loss, correct at 1, correct at 5, and count of a batch.

    Args:
        logits: (B, classes).
        labels: (B,) int64.

    Returns:
        (4,) float64.
    """
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)  # (B, 5)
    count = torch.tensor(len(labels), device=logits.device)
    return torch.stack([loss.double(), top[:, 0].sum().double(), top.any(1).sum().double(), count.double()])


def scores_from_sums(sums: Tensor) -> Scores:
    """Returns the scores from the summed ``batch_sums`` of all processes.

    Args:
        sums: (4,) summed over processes: loss, top-1 and top-5 hits, images.

    Raises:
        ValueError: no images were evaluated.
    """
    loss, top1, top5, count = sums.tolist()
    if count == 0:
        raise ValueError("no images were evaluated")
    return Scores(loss / count, 100 * top1 / count, 100 * top5 / count, int(count))


@dataclass(frozen=True)
class TokenScores:
    """The scores of one language model on one text.

    Attributes:
        loss: mean cross-entropy of a token, in nats.
        perplexity: its exponential.
        bits_per_byte: of the text as UTF-8, which can be compared between tokenizers; None where its size is not known.
        count: tokens that were predicted.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    count: int


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Computes the cross-entropy of each token, 0 for those that don't count.

    Args:
        logits: (B, N, vocabulary).
        targets: (B, N) int64, -100 where nothing counts.

    Returns:
        (B, N) float32.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)


def token_sums(losses: Tensor, targets: Tensor) -> Tensor:
    """Sums the losses and the count of tokens.

    Args:
        losses: (B, N).
        targets: (B, N) int64, negative where nothing counts.

    Returns:
        (2,) float64.
    """
    return torch.stack([losses.double().sum(), (targets >= 0).sum().double()])


def token_scores(sums: Tensor, bytes_per_token: float | None) -> TokenScores:
    """Returns the scores from the summed ``token_sums`` of all processes.

    Args:
        sums: (2,): loss, tokens.
        bytes_per_token: of the text, None where it is not known.

    Raises:
        ValueError: no tokens were evaluated.
    """
    total, count = sums.tolist()
    if count == 0:
        raise ValueError("no tokens were evaluated")
    loss = total / count
    bits = None if not bytes_per_token else loss / math.log(2) / bytes_per_token
    return TokenScores(loss, math.exp(min(loss, 700.0)), bits, int(count))
