"""Loader worker processes and signals: the training process decides when to stop, its workers serve it until then."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

PARENT_CHECK_SECONDS = 1.0


class WorkerLoader(DataLoader):
    """A DataLoader whose workers handle signals as ``init_worker`` sets them.

    Args:
        dataset, options: torch's own, without ``worker_init_fn``.
    """

    def __init__(self, dataset: Any, **options: Any) -> None:
        super().__init__(dataset, **options, worker_init_fn=init_worker)

    def __iter__(self) -> Any:
        with blocked_sigterm():  # workers inherit it
            return super().__iter__()


@contextmanager
def blocked_sigterm() -> Iterator[None]:
    """Blocks SIGTERM: it stays pending for this thread, and for the processes that it starts until they take it.

    After a fork torch starts threads of its own anew where the parent had several, before ``init_worker`` is called; a SIGTERM
    that one of them doesn't block ends the worker.
    """
    if not hasattr(signal, "sigtimedwait"):  # there nothing in a worker would wait for the signal, see ``init_worker``
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(worker_id: int) -> None:
    """Prepares a loader's worker process for signals.

    Ctrl-C and Slurm signal whole process groups. A worker that died of that would take the training process with it before it
    could save, so workers ignore SIGINT and SIGUSR1 and survive the first SIGTERM; the second ends them. The training process
    itself may end them by its first (multiprocessing does at exit), and they end when it is gone.

    Args:
        worker_id: of torch, not used.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # everywhere but on macOS; there torch's own handling stays
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_on_signals, args=(os.getppid(),), name="signals", daemon=True).start()


def _end_on_signals(parent: int) -> None:
    """Ends the process when its parent ends it or is gone, or on the second SIGTERM of another.

    A thread that waits for the signal, not a handler: only so is the sender known, and code in C does not delay it.
    torch's own watchdog looks for the parent every 5 s, and only between batches.
    """
    patience = 1
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK_SECONDS)
        if received is None:
            continue
        if received.si_pid == parent:
            break
        if not patience:
            os._exit(128 + signal.SIGTERM)
        patience -= 1
    os._exit(0)


def end_workers(loader: Any) -> None:
    """Ends a loader's persistent workers now; the next iteration starts new ones.

    After an error they would else end 5 s late: the error's traceback holds the iterator in a cycle, and the garbage collector
    may close the queues to the workers before the iterator can notify them through these.

    Args:
        loader: torch DataLoader.
    """
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None and hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
        loader._iterator = None
