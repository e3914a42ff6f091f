"""``sweep`` and ``experiments/sweep.py``: methods x options x seeds from one file."""

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_tucker.cli.common import Parser, add_device, add_plugins, parse_with_overrides, positive, run_command
from vit_tucker.run.status import guarded

if TYPE_CHECKING:
    from vit_tucker.sweep.plan import Job
    from vit_tucker.sweep.process import Executor

DESCRIPTION = (
    "Run a sweep: methods x options x seeds, all from one dense model per seed. The same command goes on where it was stopped: "
    "finished runs are not run again, interrupted ones continue."
)

EXECUTORS = ("local", "slurm")
FLAGS = {"executor": "kind", **{name: name for name in ("jobs", "launch", "time", "partition", "gpus")}}
"""Options that set keys of the sweep's executor section."""


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser("sweep", help="run methods x options x seeds from one file", description=DESCRIPTION)
    add_arguments(parser)
    parser.set_defaults(run=sweep)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``sweep``."""
    parser.add_argument("--cfg", required=True, help="sweep file, or its name below experiments/configs")
    parser.add_argument(
        "--executor",
        choices=EXECUTORS,
        help="where runs are trained: on this machine, or as jobs of a cluster (executor.kind)",
    )
    parser.add_argument(
        "--jobs", type=positive, metavar="N", help="runs at a time, among which the GPUs are divided (executor.jobs)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="CELL",
        help="run these cells only, by names with wildcards: 'gqa*' 'mla8/seed0'",
    )
    parser.add_argument("--seeds", nargs="+", default=[], metavar="SEED", help="run these seeds only")
    parser.add_argument(
        "--launch",
        metavar="ARGS",
        help="start each run by accelerate launch with these arguments, in one string (executor.launch)",
    )
    parser.add_argument("--time", metavar="MINUTES", help="time limit of a cluster job (executor.time)")
    parser.add_argument("--partition", metavar="NAME", help="partition of the cluster (executor.partition)")
    parser.add_argument("--gpus", metavar="N", help="GPUs of each run on a cluster (executor.gpus)")
    parser.add_argument(
        "--done",
        nargs="+",
        default=[],
        metavar="RESULTS",
        help="results.jsonl, or its folder: skip the runs in it, though their folders are not here",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the runs and their state")
    parser.add_argument(
        "--quick-check",
        action="store_true",
        help="try one run of each cell: two steps, an evaluation batch; nothing is kept",
    )
    add_device(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="the sweep's keys, e.g. seeds=[0,1] set.data.root=/data"
    )


def sweep_main(argv: Sequence[str] | None = None) -> int:
    """Runs ``sweep`` as ``experiments/sweep.py`` and ``./run.sh sweep`` do; returns the exit status."""
    parser = Parser(prog="sweep.py", description=DESCRIPTION)
    add_arguments(parser)
    add_plugins(parser)
    args = parse_with_overrides(parser, argv)
    return guarded(lambda: run_command(args, sweep))


def sweep(args: argparse.Namespace) -> int:
    """Plans the sweep's runs and runs those that are not done, or shows them with ``--dry-run``."""
    from vit_tucker.report.collect import SWEEP
    from vit_tucker.run.main import device_overrides
    from vit_tucker.storage.paths import refuse_unwritable
    from vit_tucker.sweep.plan import load_sweep, select_jobs

    for values in (args.only, args.done, args.seeds):  # argparse gives overrides to the option before them
        args.overrides += [text for text in values if "=" in text]
        values[:] = [text for text in values if "=" not in text]
    flags = {key: getattr(args, flag) for flag, key in FLAGS.items() if getattr(args, flag) is not None}
    texts = ("launch", "partition")
    args.overrides += [f"executor.{key}={json.dumps(value) if key in texts else value}" for key, value in flags.items()]
    args.overrides += [f"set.{override}" for override in device_overrides(args.device)]
    planned = load_sweep(args.cfg, args.overrides)
    from vit_tucker.sweep.check import describe_cost, notes_of, plan_cells  # after it: mistakes come before torch
    from vit_tucker.sweep.cluster import ClusterExecutor, refuse_cluster_keys, refuse_missing_cluster
    from vit_tucker.sweep.process import share_machine, visible_gpus
    from vit_tucker.sweep.progress_table import Display
    from vit_tucker.sweep.runner import Runner
    from vit_tucker.sweep.status import State, read_records, read_statuses

    where = planned.config.executor
    if where.kind == "slurm":
        refuse_missing_cluster()
    else:
        refuse_cluster_keys(args.overrides)
    jobs = select_jobs(planned, args.only, args.seeds)
    refuse_unwritable("output_dir", planned.output_dir, folder=True)
    flops = plan_cells(jobs)
    for note in notes_of(jobs):
        print(note)
    if args.quick_check:
        return check_cells(jobs)
    statuses = read_statuses(jobs, read_records([Path(file) for file in args.done]))
    display = Display(jobs, statuses)
    if args.dry_run:
        display.close()
        left = [job for job in jobs if statuses[job.key].state is not State.DONE]
        if left:
            print(describe_cost(left, flops))
        return 0
    planned.output_dir.mkdir(parents=True, exist_ok=True)
    (planned.output_dir / SWEEP).write_bytes(planned.file.read_bytes())
    if where.kind == "slurm":
        executor: Executor = ClusterExecutor(where, planned.output_dir)
    else:
        executor = share_machine(where.jobs or 1, where.launch, visible_gpus())
    with display:
        status = Runner(jobs, statuses, executor, display, planned.config.keep_checkpoints).run()
    display.close()
    if status == 0:
        print(f"all done; tables and figures: python -m vit_tucker tables {shlex.quote(str(planned.output_dir))}")
    return status


def check_cells(jobs: "Sequence[Job]") -> int:
    """Prints the quick check of each cell, and returns the exit status: that of the first mistake."""
    from vit_tucker.errors import VitTuckerError
    from vit_tucker.sweep.check import quick_checks

    status = 0
    for name, line in quick_checks(jobs):
        print(f"{name}: {line}" if isinstance(line, str) else f"{name}: error: {line}", flush=True)
        if isinstance(line, Exception):
            status = status or (2 if isinstance(line, VitTuckerError) else 1)
    return status
