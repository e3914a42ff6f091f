"""Sets how OpenMP's threads wait, in the environment before torch is loaded, for this process and its children.

libgomp's threads look for work 300,000 times before they sleep. Beside another busy process they take the cores from the
threads that have work. See benchmarks/busy_machine.py for what is gained and what it costs.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

USERS_OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables of the environment by which users choose how threads wait; none of them is overridden."""
SHORT_SPIN = {"GOMP_SPINCOUNT": "6000"}
"""A fiftieth of libgomp's own count: a pause between two operations of torch, not that of a thread without a core."""
NO_SPIN = {"OMP_WAIT_POLICY": "PASSIVE"}
BUSY_CORES = 0.5
SECONDS = 0.1
"""How long is looked at what others compute; /proc/stat counts in hundredths of a second."""


def choose_waiting() -> None:
    """Sets how OpenMP's threads wait, unless the user has, or torch is loaded and has read the environment."""
    if "torch" not in sys.modules and not any(name in os.environ for name in USERS_OWN):
        os.environ.update(waiting(os.environ, available_cores(), busy_cores))


def waiting(environment: Mapping[str, str], cores: int, busy: Callable[[], float]) -> dict[str, str]:
    """Returns the variables for threads that share this machine's cores with what others compute.

    Args:
        environment: OMP_NUM_THREADS is the number of own threads; all cores without it.
        cores: that this process may use.
        busy: returns the number of these cores that other processes keep busy; called only where it matters.
    """
    given = environment.get("OMP_NUM_THREADS", "").partition(",")[0]
    threads = int(given) if given.isdigit() else cores
    if threads == 1:
        return {}  # nothing waits
    return NO_SPIN if threads + busy() > cores + BUSY_CORES else SHORT_SPIN


def describe_waiting(environment: Mapping[str, str]) -> str:
    """Returns the variables that say how threads wait: 'OMP_WAIT_POLICY=PASSIVE'; 'OpenMP's own waiting' if there are none."""
    given = [f"{name}={environment[name]}" for name in USERS_OWN if name in environment]
    return " ".join(given) or "OpenMP's own waiting"


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(_own_cores())


def busy_cores(seconds: float = SECONDS) -> float:
    """Returns how many of the cores that this process may use are kept busy by other processes, measured for ``seconds``.

    Where there is no /proc/stat, it is the load of the last minute.
    """
    before, start = _idle_ticks(), time.monotonic()
    if before is None:
        return min(os.getloadavg()[0], available_cores()) if hasattr(os, "getloadavg") else 0.0
    time.sleep(seconds)
    after, passed = _idle_ticks(), time.monotonic() - start
    idle = (after or before) - before
    return max(0.0, available_cores() - idle / os.sysconf("SC_CLK_TCK") / passed)


def _own_cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _idle_ticks() -> int | None:
    """Returns the ticks that this process's cores have idled or waited for a disk; None where the system doesn't say."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    names = {f"cpu{core}" for core in _own_cores()}
    found = [line.split() for line in lines if line.partition(" ")[0] in names]
    return sum(int(part[4]) + int(part[5]) for part in found) if found else None
