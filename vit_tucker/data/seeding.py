"""Randomness as a function of what it is for: (seed, epoch, image) for augmentations, (seed, step, process) for dropout.

Nothing is drawn from a running stream, so the number of processes, of loader workers, and a resume in mid-epoch change nothing,
and no RNG state needs saving.
"""

import random

import numpy as np
import torch


def derive_seed(*keys: int) -> int:
    """Returns a 32-bit seed from non-negative integers; different keys give independent streams (numpy's SeedSequence)."""
    return int(np.random.SeedSequence(keys).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # timm's transforms and mixup draw from the global state
    torch.manual_seed(seed)


def seed_transforms(seed: int) -> None:
    """Seeds what transforms draw from: Python's, NumPy's and torch's CPU generators; not restored, which would cost far more."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # timm's transforms draw from the global state
    torch.default_generator.manual_seed(seed)
