"""Reader for the IDX format of MNIST-like data sets, plain or gzipped."""

import gzip
import struct
from pathlib import Path

import numpy as np

from vit_tucker.errors import DataError

_UINT8 = 0x08


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Returns the array of a uint8 IDX file.

    Args:
        path: the file, gzipped if its name ends in .gz.
        ndim: expected number of dimensions (3 for images, 1 for labels).

    Raises:
        DataError: unreadable, truncated, or not a uint8 IDX file of that many dimensions.

    Source: http://yann.lecun.com/exdb/mnist, "the IDX file format".
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: can't be read: {error}") from None
    if len(content) < 4 + 4 * ndim or content[:4] != bytes([0, 0, _UINT8, ndim]):
        raise DataError(f"{path}: not an IDX file of {ndim}-dimensional uint8 data")
    shape = struct.unpack(f">{ndim}I", content[4 : 4 + 4 * ndim])
    pixels = np.frombuffer(content, np.uint8, offset=4 + 4 * ndim)
    if pixels.size != int(np.prod(shape)):
        raise DataError(f"{path}: truncated: {pixels.size} bytes of data, its header promises {int(np.prod(shape))}")
    return pixels.reshape(shape)
