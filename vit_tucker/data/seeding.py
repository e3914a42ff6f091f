"""Randomness as a function of what it is for: (seed, epoch, image) for augmentations, (seed, step, process) for dropout.

Nothing is drawn from a running stream, so the number of processes, of loader workers, and a resume in mid-epoch change nothing,
and no RNG state needs saving.
"""

import contextlib
import random
from collections.abc import Iterator

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
    """Seeds what transforms draw from: Python's, NumPy's and torch's CPU generators; see ``restored_generators``."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # timm's transforms draw from the global state
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def restored_generators() -> Iterator[None]:
    """Restores the states of Python's, NumPy's and torch's CPU generators at the end; costs more than seeding them."""
    own, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(own)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
