"""Executors of sweeps on one machine: the fork server that `sweep` uses against submitit's local executor.

    python benchmarks/sweep_executors.py [--turns 3] [--out benchmarks/results/sweep_executors]

The same 8 tiny digits runs (4 cells, 2 seeds, 1 epoch of 128 images), 2 at a time, in turns. Seconds are of the clock, so that
other jobs on the machine count: compare within a turn.
"""

import argparse
import csv
import io
import os
import tempfile
import time
from pathlib import Path

from vit_tucker.sweep.cluster import ClusterExecutor
from vit_tucker.sweep.plan import load_sweep
from vit_tucker.sweep.process import Executor, share_machine
from vit_tucker.sweep.progress_table import Display
from vit_tucker.sweep.runner import Runner
from vit_tucker.sweep.schema import ExecutorConfig
from vit_tucker.sweep.status import read_statuses

AT_A_TIME = 2
SWEEP = """
base: digits/base.yaml
output_dir: out
seeds: [0, 1]
start: null
set:
  model: {depth: 1, embed_dim: 32, num_heads: 4}
  train: {epochs: 1, warmup_epochs: 0, global_batch_size: 64, cpu: true}
  data: {num_samples: 128}
cells:
- {name: mha, attention: null}
- {name: gqa1, attention: {method: gqa, num_kv_heads: 1}}
- {name: gqa2, attention: {method: gqa, num_kv_heads: 2}}
- {name: tucker, attention: {method: tucker, ranks: [4, 8, 8]}}
"""


def make_executor(kind: str, folder: Path) -> Executor:
    """Returns the fork server, or submitit's local executor limited to as many runs at a time."""
    if kind == "fork_server":
        return share_machine(AT_A_TIME, None, [])
    executor = ClusterExecutor(ExecutorConfig(), folder, "local", poll_seconds=0.2)
    executor.capacity = AT_A_TIME
    return executor


def sweep_seconds(kind: str) -> tuple[int, float]:
    """Returns the number of runs of a whole sweep in a new folder, and its seconds.

    Raises:
        RuntimeError: a run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "sweep.yaml")
        file.write_text(SWEEP)
        planned = load_sweep(file, [f"output_dir={folder}/out"])
        planned.output_dir.mkdir()
        statuses, said = read_statuses(planned.jobs, {}), io.StringIO()
        start = time.perf_counter()
        executor = make_executor(kind, planned.output_dir)
        failed = Runner(planned.jobs, statuses, executor, Display(planned.jobs, statuses, said)).run()
        if failed:
            raise RuntimeError(said.getvalue())
        return len(planned.jobs), time.perf_counter() - start


def main() -> None:
    """Measures both in turns, and writes sweep_executors.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/sweep_executors")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "sweep_executors.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["turn", "executor", "runs", "at_a_time", "seconds", "load_before"])
        for turn in range(args.turns):
            for kind in ("fork_server", "submitit_local"):
                load = os.getloadavg()[0]
                runs, seconds = sweep_seconds(kind)
                rows.writerow([turn, kind, runs, AT_A_TIME, f"{seconds:.1f}", f"{load:.1f}"])
                print(f"turn {turn}: {kind}: {runs} runs in {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
