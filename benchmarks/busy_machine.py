"""What OpenMP's waiting threads cost beside other processes, and what it costs not to let them spin on a quiet machine.

    python benchmarks/busy_machine.py [--turns 25] [--save benchmarks/results/busy_machine]

libgomp's threads look for the next parallel region 300,000 times before they sleep. Each setting is a
process of its own, since OpenMP reads the environment once; all of them train in turns, a burst each, in three conditions: alone,
beside a process that computes in one thread (pure Python), and beside a copy of the same training under the same setting. The
ratio is images/s over those of torch's default in the same turn: above 1 is faster. Run it on an otherwise quiet machine.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import IO, cast

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin 3000": {"GOMP_SPINCOUNT": "3000"},
    "spin 6000": {"GOMP_SPINCOUNT": "6000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
MODELS = {"digits": (32, 4, 6, 32), "vit_s": (224, 16, 12, 4)}
"""Image size, patch size, depth and batch size of a small ViT with Tucker Attention, of which a training step is timed."""
LAYERS = {"dense_layer": (8, 65, 384, 6), "tucker_layer": (8, 197, 768, 12)}
"""Batch size, tokens, width and heads of timm's layer and of Tucker Attention (8, 16, 16), of which the forward pass is timed."""
WORKLOADS = (*MODELS, *LAYERS)
CONDITIONS = ("alone", "beside_python", "beside_itself")
COLUMNS = ("workload", "condition", "setting", "turn", "samples_per_sec", "ratio")


def make_step(workload: str) -> tuple[Callable[[], None], int]:
    """Returns a training step of a model, or the forward pass of a layer, and the images of it."""
    import timm
    import torch
    from timm.layers import Attention

    import vit_tucker

    torch.manual_seed(0)
    if workload in LAYERS:
        batch, tokens, width, heads = LAYERS[workload]
        layer = torch.nn.Sequential(Attention(width, num_heads=heads, qkv_bias=True))
        if workload == "tucker_layer":
            vit_tucker.patch(layer, "tucker", ranks=(8, 16, 16), init="random")
        x = torch.randn(batch, tokens, width)

        @torch.inference_mode()
        def forward() -> None:
            layer(x)

        return forward, batch
    size, patch, depth, batch = MODELS[workload]
    name = "vit_tiny_patch16_224" if workload == "digits" else "vit_small_patch16_224"
    model = timm.create_model(name, img_size=size, patch_size=patch, depth=depth, num_classes=10)
    vit_tucker.patch(model, "tucker", ranks=(3, 16, 16), init="random")
    images = torch.randn(batch, 3, size, size)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        loss = model(images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, batch


def serve(workload: str) -> None:
    """Computes for as many seconds as each line of standard input says, and answers it with images per second."""
    step, batch = make_step(workload)
    step()
    print("ready", flush=True)
    for line in sys.stdin:
        steps, start = 0, time.perf_counter()
        while time.perf_counter() - start < float(line):
            step()
            steps += 1
        print(batch * steps / (time.perf_counter() - start), flush=True)


class Training:
    """A process that trains in bursts.

    Args:
        workload: a name of WORKLOADS.
        setting: a name of SETTINGS.
    """

    def __init__(self, workload: str, setting: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        command = [sys.executable, __file__, "--serve", workload]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.process = subprocess.Popen(command, env=environment | SETTINGS[setting], **streams)  # type: ignore[call-overload]
        self.answer()

    def start(self, seconds: float) -> None:
        """Starts a burst."""
        cast(IO[str], self.process.stdin).write(f"{seconds}\n")

    def answer(self) -> str:
        """Waits for the end of the burst and returns what it answers."""
        line = cast(IO[str], self.process.stdout).readline()
        if not line:
            raise RuntimeError("a training process has failed; see above")
        return line


def measure(
    workload: str, condition: str, settings: Iterable[str], turns: int, seconds: float
) -> dict[str, list[float]]:
    """Returns images per second of each setting in each turn."""
    mine = {setting: Training(workload, setting) for setting in settings}
    others = {setting: Training(workload, setting) for setting in settings if condition == "beside_itself"}
    processes = [training.process for training in (*mine.values(), *others.values())]
    if condition == "beside_python":
        processes.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
    rates: dict[str, list[float]] = {setting: [] for setting in settings}
    try:
        for _ in range(turns):
            for setting in settings:
                together = [training[setting] for training in (others, mine) if setting in training]
                for training in together:
                    training.start(seconds)
                rates[setting].append([float(training.answer()) for training in together][-1])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return rates


def summary(rows: list[dict[str, object]]) -> list[tuple[str, ...]]:
    """Returns the table's rows: medians over turns, and the quartiles of the ratio."""
    lines = []
    for key in dict.fromkeys((row["workload"], row["condition"], row["setting"]) for row in rows):
        mine = [row for row in rows if (row["workload"], row["condition"], row["setting"]) == key]
        rates, ratios = ([float(str(row[name])) for row in mine] for name in ("samples_per_sec", "ratio"))
        low, median, high = statistics.quantiles(ratios, n=4)
        lines.append((*map(str, key), f"{statistics.median(rates):.1f}", f"{median:.3f}", f"{low:.3f} - {high:.3f}"))
    return lines


def main() -> int:
    """Measures all settings, prints their table and saves it; returns the exit status."""
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=25, help="bursts of each setting, 2 at least")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a burst")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="where busy_machine.csv and busy_machine.md go")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    for workload in args.workloads:
        for condition in args.conditions:
            rates = measure(workload, condition, SETTINGS, max(2, args.turns), args.seconds)
            for setting, own in rates.items():
                for turn, rate in enumerate(own):
                    ratio = rate / rates["default"][turn]
                    values = (workload, condition, setting, turn, round(rate, 2), round(ratio, 4))
                    rows.append(dict(zip(COLUMNS, values, strict=True)))
            print(
                workload,
                condition,
                *(f"{s}: {statistics.median(own):.1f}" for s, own in rates.items()),
                sep="  ",
                flush=True,
            )
    import torch  # after the measurement: its threads would wait beside the others'

    from vit_tucker.analysis.latency import describe_device
    from vit_tucker.show.tables import csv_text, markdown

    table = markdown(
        ("workload", "condition", "setting", "images/s", "ratio", "quartiles"), summary(rows), text_columns=3
    )
    where = f"{describe_device(torch.device('cpu'))}, {os.cpu_count()} cores; torch {torch.__version__}; {date.today()}"
    text = f"{table}\n\nMedians of {args.turns} turns of {args.seconds:g} s. {where}.\n"
    print(f"\n{text}")
    if args.save is not None:
        args.save.mkdir(parents=True, exist_ok=True)
        (args.save / "busy_machine.md").write_text(text)
        (args.save / "busy_machine.csv").write_text(csv_text(COLUMNS, (row.values() for row in rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
