"""The exit status of a command: 0 done, 1 failed, 2 bad config or arguments, 130 interrupted."""

import errno
import os
import sys
from collections.abc import Callable

from vit_tucker.errors import FailedError, StoppedError, VitTuckerError, shorten

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Faults of a disk that a user can mend."""


def guarded(command: Callable[[], int]) -> int:
    """Returns the exit status of a command; user errors become one line on standard error, from the first process only."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        status = command()
        sys.stdout.flush()
        return status
    except (VitTuckerError, FailedError) as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, VitTuckerError) else 1
    except StoppedError as stop:
        if first:
            print(stop, file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, head or less, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            print(f"error: {shorten(error.filename)}: a longer name than file systems take", file=sys.stderr)
            return 2
        if error.errno not in FULL:
            raise
        print(f"error: {error.filename or 'the output'} can't be written: {error.strerror}", file=sys.stderr)
        if error.filename is None:  # what is left of it would fail again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if first:
            print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
