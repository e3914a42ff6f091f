"""The two sides of benchmarks/engine.py: their command lines for one recipe, and what they say of their log points."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from engine_data import CLASSES, Case
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[1]
TRAIN = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "clip_grad": 1.0, "sched": "cosine", "warmup_epochs": 0,
         "epochs": 1, "smoothing": 0.1}  # fmt: skip
AUGMENT = {"scale": [0.08, 1.0], "ratio": [0.75, 1.3333], "hflip": 0.5}
JITTER = {3: 0.4, 1: None}
"""timm's default for colour images; there is no colour in grey ones."""
TIMM_STEP = re.compile(r"Train: 0 \[ *(\d+)/")
TIMM_WAIT = re.compile(r"\(([\d.]+)s, .*Data: [\d.]+ \(([\d.]+)\)")


def our_config(case: Case, args: argparse.Namespace, data: Path, out: Path) -> dict[str, Any]:
    """Our run as a config file's values."""
    grey = {"mean": [0.5], "std": [0.5]} if case.channels == 1 else {}
    return {
        "model": {"name": args.model, "num_classes": CLASSES, "in_chans": case.channels, **case.model},
        "data": {
            "dataset": "fashion_mnist" if case.memory else "folder",
            "root": str(data),
            "num_workers": args.workers,
            **AUGMENT,
            "color_jitter": JITTER[case.channels],
            **grey,
        },
        "train": {
            **TRAIN,
            "global_batch_size": case.batch_size,
            "log_interval": case.interval,
            "cpu": args.device == "cpu",
            "mixed_precision": "no" if args.device == "cpu" else "bf16",
        },
        "output_dir": str(out),
        "seed": 0,
    }


def commands(case: Case, args: argparse.Namespace, data: Path, out: Path) -> dict[str, list[str]]:
    """Both command lines; writes our config file."""
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(our_config(case, args, data, out), sort_keys=False))
    flags: dict[str, Any] = {**TRAIN, **AUGMENT, "batch_size": case.batch_size, "workers": args.workers, "seed": 0}
    flags |= {"model": args.model, "num_classes": CLASSES, "input_size": case.input_size, "device": args.device}
    flags |= {"log_interval": case.interval, "output": out, "experiment": "timm"}
    flags["color_jitter"] = JITTER[case.channels] or 0
    if case.channels == 1:
        flags |= {"mean": [0.5], "std": [0.5]}
    timm_line = [sys.executable, str(args.timm_train), str(data), "--sched-on-updates"]
    for name, value in flags.items():
        timm_line += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list | tuple) else [value])]
    if case.model:
        timm_line += ["--model-kwargs", *(f"{k}={v}" for k, v in case.model.items())]
    if args.device == "cuda":
        timm_line += ["--amp", "--amp-dtype", "bfloat16", "--pin-mem"]  # what ours does on a GPU
    return {"ours": [sys.executable, str(ROOT / "experiments" / "train_vit.py"), "--cfg", str(file)], "timm": timm_line}


def run(command: list[str], threads: int) -> list[tuple[float, str]]:
    """Lines of a command's output and when they came.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = [(time.time(), line.rstrip()) for line in process.stdout]
    if process.wait():
        tail = "\n".join(line for _, line in lines[-15:])
        raise RuntimeError(f"{shlex.join(command)}\nended with status {process.returncode}:\n{tail}")
    return lines


def our_points(out: Path, interval: int) -> tuple[dict[int, float], float, float | None]:
    """When our log points were written, parameters in millions, and the share of waiting for data where it is logged."""
    events = EventAccumulator(str(out), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    scalars = [event for tag in tags for event in events.Scalars(tag)]
    points: dict[int, float] = {}
    for event in scalars:
        if event.step and event.step % interval == 0:
            points[event.step] = max(event.wall_time, points.get(event.step, 0.0))
    waits = [events.Scalars(tag)[-1].value for tag in tags if "data_wait" in tag]
    params = json.loads((out / "results.json").read_text())["params"]["total"] / 1e6
    return points, params, waits[0] if waits else None


def timm_points(lines: list[tuple[float, str]]) -> tuple[dict[int, float], float, float | None]:
    """The same of timm's output; its first line comes after one step, so step i + 1 is called i."""
    found = [(int(match[1]), moment, line) for moment, line in lines if (match := TIMM_STEP.search(line))]
    params = next(int(text.split("param count:")[1]) for _, text in lines if "param count:" in text) / 1e6
    means = TIMM_WAIT.search(found[-1][2]) if found else None
    wait = float(means[2]) / float(means[1]) if means is not None and float(means[1]) else None
    return {step: moment for step, moment, _ in found if step}, params, wait
