"""Random numbers as a function of a counter (Philox4x32-10), for many counters at once.

Seeding a generator for each image costs more than drawing its few numbers; this needs no seeding.
"""

import numpy as np

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10


def philox(counters: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Four random words for each counter.

    Args:
        counters: (..., 4), integers below 2^32.
        key: two integers below 2^32.

    Returns:
        (..., 4) uint64, values below 2^32.

    Source: J. K. Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
    """
    words = np.moveaxis(np.asarray(counters, dtype=np.uint64), -1, 0)
    first, second, third, fourth = (words[i].copy() for i in range(4))
    for step in range(_ROUNDS):
        a, b = first * _MULTIPLIERS[0], third * _MULTIPLIERS[1]
        keys = [np.uint64((key[i] + step * _WEYL[i]) & 0xFFFFFFFF) for i in range(2)]
        first, third = (b >> _HALF) ^ second ^ keys[0], (a >> _HALF) ^ fourth ^ keys[1]
        second, fourth = b & _LOW, a & _LOW
    return np.stack([first, second, third, fourth], axis=-1)


def uniforms(words: np.ndarray) -> np.ndarray:
    """Words as float64 in the open interval (0, 1)."""
    return (words.astype(np.float64) + 0.5) / 2.0**32
