"""What the speed benchmarks share: arguments, the start of a measurement, and how results are written."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from roofline import Machine, measure_machine
from turns import DTYPES

from vit_tucker.analysis.latency import describe_device
from vit_tucker.attention.backends import AUTO, get_backend, recorded_choices
from vit_tucker.errors import ConfigError
from vit_tucker.show.tables import csv_text
from vit_tucker.storage.paths import refuse_unwritable


def device_parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments of all speed benchmarks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32", help="of autocast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="of torch on the CPU")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.1, help="that a turn lasts at least")
    parser.add_argument("--compile", action="store_true", help="torch.compile everything")
    return parser


def start(args: argparse.Namespace, backends: Iterable[str]) -> Machine:
    """Check the arguments, record from now on which backends run (``args.choices``), and measure the machine.

    Raises:
        ConfigError: an argument that can't be used.
    """
    for backend in backends:
        if backend != AUTO:
            get_backend(backend)
    if args.save is not None:
        refuse_unwritable("--save", args.save, folder=True)
    if args.turns < 2:
        raise ConfigError("--turns: 2 at least, for quartiles")
    try:
        device = torch.device(args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.recording = ExitStack()  # until the process ends
    args.choices = args.recording.enter_context(recorded_choices())
    return measure_machine(device, args.precision, min(7, args.turns))


def describe(args: argparse.Namespace, machine: Machine) -> str:
    """Where, when and how, as a list in Markdown."""
    device = torch.device(args.device)
    name = cpu_name() if device.type == "cpu" else describe_device(device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return "\n".join([
        f"- {date.today()}, {name}{threads}, {args.precision}{', compiled' if args.compile else ''}, torch {torch.__version__}, "
        f"timm {timm.__version__}; {args.turns} turns of {args.seconds} s and more",
        f"- measured rates: {machine.flops / 1e9:.0f} GFLOP/s of products, {machine.exps / 1e9:.2f} G exponentials/s, "
        f"{machine.bandwidth / 1e9:.1f} GB/s of copying",
        f"- command: `python benchmarks/{command}`",
        *(f"- backend {line}" for line in args.choices.lines()),
    ])  # fmt: skip


def cpu_name() -> str:
    """'AMD EPYC', as the system says it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def save_tables(
    args: argparse.Namespace,
    stem: str,
    columns: Sequence[str],
    rows: Sequence[dict[str, Any]],
    text: str,
    machine: Machine,
) -> None:
    """Print where and how, and write STEM.csv and STEM.md into the folder asked for."""
    print(describe(args, machine))
    if args.save is None:
        return
    args.save.mkdir(parents=True, exist_ok=True)
    raw = [[rounded(row.get(column)) for column in columns] for row in rows]
    (args.save / f"{stem}.csv").write_text(csv_text(columns, raw))
    (args.save / f"{stem}.md").write_text(f"{text.rstrip()}\n\n{describe(args, machine)}\n")


def rounded(value: Any) -> Any:
    """Four significant digits: such times have no more."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
