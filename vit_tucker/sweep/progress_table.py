"""Shows the table of a sweep's runs: cells by seeds, live on a terminal, one line per event elsewhere."""

import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from vit_tucker.show.measures import IMAGE_MEASURES
from vit_tucker.sweep.plan import Job
from vit_tucker.sweep.status import State, Status

SHORT = {state: state.value for state in (State.QUEUED, State.BLOCKED, State.ELSEWHERE)}
SHORT |= {State.WAITING: ".", State.FAILED: "FAILED"}
Statuses = Mapping[tuple[str, int], Status]


def entry(status: Status, epochs: int) -> str:
    """Returns one run's entry in the table: '99.17', '>3/8 97.2', 'FAILED'."""
    if status.state is State.DONE:
        return f"{status.score:.2f}"
    if status.state in SHORT:
        return SHORT[status.state]
    mark = ">" if status.state is State.RUNNING else "|"
    return f"{mark}{status.epoch}/{epochs}" + ("" if status.score is None else f" {status.score:.1f}")


def progress_table(jobs: Sequence[Job], statuses: Statuses, most: int | None = None) -> Table:
    """Returns the table: a row per cell, a column per seed, and the mean of what is done.

    Args:
        jobs: the runs to show.
        statuses: their states.
        most: rows; a longer table has those cells only that are being trained.
    """
    seeds = list(dict.fromkeys(job.seed for job in jobs))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=None)
    table.add_column("cell", no_wrap=True)
    measure = next((s.measure for s in statuses.values() if s.score is not None), IMAGE_MEASURES[0])
    for title in (*(f"seed {seed}" for seed in seeds), f"mean {measure.heading}"):
        table.add_column(title, justify="right", no_wrap=True)
    by_name: dict[str, dict[int, Job]] = {}
    for job in jobs:
        by_name.setdefault(job.name, {})[job.seed] = job
    if most is not None and len(by_name) > most:
        active = {job.name for job in jobs if statuses[job.key].state is State.RUNNING}
        by_name = {name: by_name[name] for name in by_name if name in active}
    for name, runs in by_name.items():
        cells = [entry(statuses[name, seed], runs[seed].config.train.epochs) if seed in runs else "" for seed in seeds]
        done = [s.score for seed in runs if (s := statuses[name, seed]).state is State.DONE and s.score is not None]
        spread = f" +- {statistics.stdev(done):.2f}" if len(done) > 1 else ""
        table.add_row(name, *cells, f"{statistics.fmean(done):.2f}{spread}" if done else "")
    return table


class Display:
    """Shows a sweep while it runs, as a context manager.

    Args:
        jobs: the runs to show.
        statuses: their states, updated by whoever runs them.
        stream: what is written to; standard output if None.
    """

    def __init__(self, jobs: Sequence[Job], statuses: Statuses, stream: TextIO | None = None):
        self._jobs, self._statuses, self._stream = jobs, statuses, stream or sys.stdout
        terminal = self._stream.isatty()
        self._console = Console(
            file=self._stream, force_terminal=terminal, color_system=None, markup=False, highlight=False, emoji=False
        )
        self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False)

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        self._console.print(line, soft_wrap=True)

    def draw(self, note: str) -> None:
        """Redraws the live table, with a text beside the counts; does nothing where there is no terminal."""
        if self._live.is_started:
            table = progress_table(self._jobs, self._statuses, self._console.height - 4)
            self._live.update(Group(table, f"{self._count()}{note}"), refresh=True)

    def close(self) -> None:
        """Prints the whole table, once more, to stay."""
        plain = Console(width=10_000, color_system=None, force_terminal=False)
        with plain.capture() as captured:
            plain.print(progress_table(self._jobs, self._statuses))
        for line in captured.get().splitlines():
            self.say(line.rstrip())
        for job in self._jobs:
            if (status := self._statuses[job.key]).reason:
                self.say(f"{job.name}, seed {job.seed}: {status.state.value}: {status.reason}")
        self.say(self._count())

    def _count(self) -> str:
        """Returns '12 done, 2 running, 4 waiting'."""
        states = [self._statuses[job.key].state for job in self._jobs]
        return ", ".join(f"{states.count(state)} {state.value}" for state in reversed(State) if state in states)
