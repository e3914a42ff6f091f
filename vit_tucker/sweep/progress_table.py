"""The table of a sweep's runs: cells by seeds, redrawn on a terminal, one line per event elsewhere."""

import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from vit_tucker.sweep.plan import Job
from vit_tucker.sweep.status import State, Status, count_states

SHORT = {
    State.WAITING: ".",
    State.BLOCKED: "blocked",
    State.FAILED: "FAILED",
    State.ELSEWHERE: "elsewhere",
}
Statuses = Mapping[tuple[str, int], Status]


def entry(status: Status, epochs: int) -> str:
    """One run in the table: '99.17', '3/8 97.2', 'FAILED'."""
    if status.state is State.DONE:
        return f"{status.top1:.2f}"
    if status.state in SHORT:
        return SHORT[status.state]
    mark = ">" if status.state is State.RUNNING else "|"
    return f"{mark}{status.epoch}/{epochs}" + ("" if status.top1 is None else f" {status.top1:.1f}")


def board(jobs: Sequence[Job], statuses: Statuses) -> list[str]:
    """The table's lines: a row per cell, a column per seed, and the mean of what is done."""
    seeds = list(dict.fromkeys(job.seed for job in jobs))
    rows = [("cell", *(f"seed {seed}" for seed in seeds), "mean top-1 %")]
    by_name: dict[str, dict[int, Job]] = {}
    for job in jobs:
        by_name.setdefault(job.name, {})[job.seed] = job
    for name, runs in by_name.items():
        cells = [entry(statuses[name, seed], runs[seed].config.train.epochs) if seed in runs else "" for seed in seeds]
        done = [s.top1 for seed in runs if (s := statuses[name, seed]).state is State.DONE and s.top1 is not None]
        spread = f" +- {statistics.stdev(done):.2f}" if len(done) > 1 else ""
        rows.append((name, *cells, f"{statistics.fmean(done):.2f}{spread}" if done else ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


class Display:
    """Shows a sweep while it runs.

    Args:
        jobs: the runs to show.
        statuses: their states, updated by whoever runs them.
        stream: where to; standard output if None.
    """

    def __init__(self, jobs: Sequence[Job], statuses: Statuses, stream: TextIO | None = None):
        self._jobs, self._statuses, self._stream = jobs, statuses, stream or sys.stdout
        self._live = self._stream.isatty()
        self._drawn = 0

    def say(self, line: str) -> None:
        """A line that stays."""
        self._erase()
        print(line, file=self._stream, flush=True)

    def draw(self, left: str) -> None:
        """The live table; nothing where there is no terminal.

        Args:
            left: what is said beside the counts.
        """
        if not self._live:
            return
        self._erase()
        width, height = shutil.get_terminal_size()
        lines = board(self._jobs, self._statuses)
        if len(lines) > height - 3:
            active = {job.name for job in self._jobs if self._statuses[job.key].state is State.RUNNING}
            lines = [lines[0], *(line for line in lines[1:] if line.split(" ", 1)[0] in active)]
        lines.append(f"{count_states(self._statuses[job.key] for job in self._jobs)}{left}")
        for line in lines:
            print(line[: width - 1], file=self._stream)
        self._stream.flush()
        self._drawn = len(lines)

    def close(self) -> None:
        """The whole table, once more, to stay."""
        self._erase()
        print("\n".join(board(self._jobs, self._statuses)), file=self._stream)
        for job in self._jobs:
            if (status := self._statuses[job.key]).reason:
                print(f"{job.name}, seed {job.seed}: {status.state.value}: {status.reason}", file=self._stream)
        print(count_states(self._statuses[job.key] for job in self._jobs), file=self._stream, flush=True)

    def _erase(self) -> None:
        if self._drawn:
            print(f"\x1b[{self._drawn}F\x1b[J", end="", file=self._stream)
            self._drawn = 0
