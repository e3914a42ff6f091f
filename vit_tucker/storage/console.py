"""A run's lines on standard output."""

import logging
import sys

from tqdm import tqdm


class Console(logging.StreamHandler):
    """Standard output, which may be a file on a full disk, or a terminal that shows progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line, above the progress bars if there are some."""
        with tqdm.external_write_mode(self.stream):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Passes over a line that can't be written; what is no fault of the system is shown as ever."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
