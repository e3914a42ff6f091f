"""Loader workers and signals, with real processes."""

import multiprocessing
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from vit_tucker.data.workers import WorkerLoader, end_workers

pytestmark = pytest.mark.slow


class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        time.sleep(0.01)
        return index * index


def start(kind=WorkerLoader):
    """A loader that is being read, its iterator, and its workers' processes."""
    # lists, not tensors: these come through a socket of the worker, whose end may be noticed there first, in other words
    loader = kind(Squares(), num_workers=2, batch_size=2, persistent_workers=True, collate_fn=list)
    iterator = iter(loader)
    values = [*next(iterator), *next(iterator)]  # a batch of each worker, so that both handle signals by now
    return loader, iterator, values, loader._iterator._workers


def send(name, workers):
    """As another process: for its parent a worker does what it is told at once."""
    subprocess.run(["kill", f"-{name}", *[str(worker.pid) for worker in workers]], check=True)
    time.sleep(0.1)


def end_and_read(workers, iterator):
    send("TERM", workers)
    assert gone_within(
        5, lambda: any(worker.is_alive() for worker in workers)
    )  # else they might be faster than their end
    return rest(iterator)


def rest(iterator):
    return [value for batch in iterator for value in batch]


def gone_within(seconds, alive):
    """Whether ``alive()`` becomes false in that time."""
    end = time.monotonic() + seconds
    while alive() and time.monotonic() < end:
        time.sleep(0.02)
    return not alive()


@pytest.fixture
def threads():
    """Two threads of torch in this process: its workers start them anew before they can block a signal."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_workers_serve_on_through_the_signals_of_a_process_group():
    loader, iterator, values, workers = start()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())  # this process itself goes by it as ever
    for name in ("INT", "USR1", "TERM", "INT"):
        send(name, workers)
    assert values + rest(iterator) == [i * i for i in range(40)]
    assert rest(iter(loader)) == [i * i for i in range(40)]  # and through the next epoch
    started = time.monotonic()
    end_workers(loader)
    assert time.monotonic() - started < 4  # torch waits 5 s for a worker that does not end by itself
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("kind", [WorkerLoader, DataLoader])
def test_the_second_sigterm_ends_them_where_torchs_own_die_of_the_first(kind):
    loader, iterator, _, workers = start(kind)
    if kind is WorkerLoader:
        send("TERM", workers)
        assert all(worker.is_alive() for worker in workers)
    with pytest.raises(RuntimeError, match="DataLoader worker"):  # torch notices the end of a worker wherever it is
        end_and_read(workers, iterator)
    assert gone_within(2, lambda: any(worker.is_alive() for worker in workers))
    end_workers(loader)


def test_the_parent_ends_them_with_one_sigterm():
    loader, _, _, workers = start()
    for worker in workers:
        worker.terminate()  # as multiprocessing does at exit
    assert gone_within(2, lambda: any(worker.is_alive() for worker in workers))
    end_workers(loader)


def start_and_sleep(pipe):
    """Starts workers, sends their process ids, and waits to be killed."""
    kept = start()
    pipe.send([worker.pid for worker in kept[3]])
    time.sleep(60)


def test_they_end_when_the_parent_is_killed():
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    parent = context.Process(target=start_and_sleep, args=(there,))
    parent.start()
    pids = here.recv()
    assert len(pids) == 2
    assert all(running(pid) for pid in pids)
    parent.kill()
    parent.join()
    assert gone_within(3, lambda: any(running(pid) for pid in pids))  # torch alone needs up to 5 s


def running(pid):
    """Whether a process runs; an orphan that nobody waits for may stay as a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
