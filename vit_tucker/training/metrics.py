"""Sums over images that add up exactly over batches and processes."""

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
