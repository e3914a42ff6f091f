"""TensorBoard's events of a run, which may get lost (a full disk, a quota) at the price of one warning."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from vit_tucker.storage.run_dir import warn_of_loss


class Events:
    """Writes TensorBoard's events until the first fault of the file system.

    Args:
        folder: where its file goes.
        first_step: TensorBoard drops what an earlier try wrote from this step on.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._hook = threading.excepthook
        threading.excepthook = self._quiet_writer
        self._writer: SummaryWriter | None = None
        self._guarded(lambda: setattr(self, "_writer", SummaryWriter(str(folder), purge_step=first_step)))

    def scalar(self, name: str, value: float | None, step: int) -> None:
        """Writes a number, if it is not None.

        Args:
            name: of the curve.
            value: the number.
            step: global step.
        """
        self._write(lambda writer: writer.add_scalar(name, value, step))

    def text(self, name: str, text: str, step: int) -> None:
        """Writes a text in Markdown.

        Args:
            name: of the text.
            text: in Markdown.
            step: global step.
        """
        self._write(lambda writer: writer.add_text(name, text, step))

    def image(self, name: str, pixels: Any, step: int) -> None:
        """Writes a picture of some predictions or the like.

        Args:
            name: of the picture.
            pixels: (channels, height, width), float in [0, 1] or uint8.
            step: global step.
        """
        self._write(lambda writer: writer.add_image(name, pixels, step))

    def hyperparameters(self, values: Mapping[str, float | str | bool], finished: bool = False) -> None:
        """Writes a run's row of TensorBoard's table of hyperparameters, or its end, into the file of its scalars.

        TensorBoard shows the columns that any of the runs has, and all scalars as results. SummaryWriter.add_hparams would state
        the columns of one run, which TensorBoard takes for those of all, and write into a folder of its own.
        """

        def write(writer: SummaryWriter) -> None:
            _, start, end = hparams(dict(values), {})
            writer._get_file_writer().add_summary(end if finished else start)

        self._write(write)

    def close(self) -> None:
        """Writes what is still buffered."""
        self._write(lambda writer: writer.close())
        threading.excepthook = self._hook

    def _write(self, write: Callable[[SummaryWriter], Any]) -> None:
        if (writer := self._writer) is not None:
            self._guarded(lambda: write(writer))

    def _guarded(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except OSError as error:
            self._writer = None
            warn_of_loss("TensorBoard's events", error)

    def _quiet_writer(self, args: threading.ExceptHookArgs) -> None:
        """Hides faults of TensorBoard's own thread: they come back with the next call, and need no traceback too."""
        if not (type(args.thread).__module__.startswith("tensorboard") and issubclass(args.exc_type, OSError)):
            self._hook(args)
