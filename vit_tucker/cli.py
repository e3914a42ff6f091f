"""Command lines: parse, call one function, turn errors into one line and an exit status.

Exit status: 0 done, 1 failed, 2 bad config or arguments, 130 interrupted.
"""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vit_tucker import cli_cost, cli_export
from vit_tucker.errors import FailedError, StoppedError, VitTuckerError


def guarded(command: Callable[[], int]) -> int:
    """Exit status of a command; user errors become one line on standard error, from the first process only."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        status = command()
        sys.stdout.flush()
        return status
    except (VitTuckerError, FailedError) as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, VitTuckerError) else 1
    except StoppedError as stop:
        if first:
            print(stop, file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, head or less, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        if first:
            print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130


def parse_with_overrides(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with all ``key=value`` in ``overrides``: argparse takes these only where it meets them first.

    Args:
        parser: with an argument ``overrides``, unless the command takes none.
        argv: as for ``parse_args``.
    """
    args, extra = parser.parse_known_args(argv)
    if extra and (not hasattr(args, "overrides") or any(text.startswith("-") for text in extra)):
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if extra:
        args.overrides += extra
    return args


def train_main(argv: Sequence[str] | None = None) -> int:
    """``experiments/train_vit.py`` and ``./run.sh train``."""
    parser = argparse.ArgumentParser(
        prog="train_vit.py",
        description="Train a timm ViT, dense or with another attention. The same command on the same folder continues the run.",
    )
    parser.add_argument("--cfg", required=True, help="config file, name below experiments/configs, or a run folder")
    parser.add_argument("--evaluate", action="store_true", help="evaluate only: the run's best weights, or the start")
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="continue the folder's run with this config even if it began with another",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan: model, patch, groups, steps, memory")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config keys to override, values in YAML")
    args = parse_with_overrides(parser, argv)
    return guarded(lambda: _train(args))


def _train(args: argparse.Namespace) -> int:
    from vit_tucker.config.load import load_config
    from vit_tucker.run import run

    config = load_config(args.cfg, args.overrides)
    if Path(args.cfg).is_dir():
        config = config.model_copy(update={"output_dir": str(Path(args.cfg))})
    try:
        run(config, args.evaluate, args.allow_changes, args.dry_run)
    except StoppedError as stop:
        command = resume_command(str(config.output_dir))
        raise StoppedError(f"{stop}; the same command continues{f', or: {command}' if command else ''}") from None
    return 0


def resume_command(folder: str) -> str | None:
    """The command that continues a run here, on as many processes as there are now; None on several machines."""
    processes, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if processes != here:
        return None
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    script = sys.argv[0] if sys.argv[0].endswith(".py") else "experiments/train_vit.py"
    launcher = [python, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    return shlex.join([*(launcher if processes > 1 else [python]), script, "--cfg", folder])


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vit_tucker``."""
    parser = argparse.ArgumentParser(prog="python -m vit_tucker", description="Attention methods for timm ViTs.")
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="what a config's patch would do: a table, or --json")
    plan.add_argument("--cfg", required=True, help="config file, name below experiments/configs, or a run folder")
    plan.add_argument("--json", action="store_true")
    plan.add_argument("overrides", nargs="*", metavar="key.sub=value")
    compare = commands.add_parser("compare", help="runs side by side, from their results.json")
    compare.add_argument("runs", nargs="+", type=Path, help="run folders")
    compare.add_argument(
        "--save", type=Path, metavar="FOLDER", help="keep configs, summaries, results and the table there"
    )
    ranks = commands.add_parser(
        "ranks",
        help="the ranks that a model's attention really has: CSV files and a figure",
        description="Singular values and ranks of the pre- and post-softmax tensors of each attention layer, mode by mode.",
    )
    ranks.add_argument("model", metavar="MODEL", help="timm model name")
    weights = ranks.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint", metavar="FILE", help="weights of a dense model, or a run folder; timm's own if left out"
    )
    weights.add_argument("--random", action="store_true", help="timm's initialisation instead of trained weights")
    ranks.add_argument(
        "--data", metavar="DATASET", help="also whitened by the tokens of training images of this data set"
    )
    ranks.add_argument("--images", type=int, default=256, help="how many of them")
    ranks.add_argument(
        "--gqa", type=_numbers, metavar="G,...", help="key/value heads whose reach is marked in the figure"
    )
    ranks.add_argument(
        "--mla", type=_numbers, metavar="C,...", help="latent widths whose reach is marked in the figure"
    )
    ranks.add_argument("--out", type=Path, metavar="FOLDER", help="where to; runs/ranks-MODEL if left out")
    ranks.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config keys, e.g. model.img_size=224")
    hosts = commands.add_parser(
        "hosts",
        help="which timm models can be patched, by which methods, and why not",
        description="The attention of timm's models, read from their structure (on the meta device, about two minutes for all).",
    )
    hosts.add_argument("--filter", metavar="PATTERN", help="names of models with wildcards, e.g. 'vit_*'")
    hosts.add_argument("--json", action="store_true", help="for machines")
    hosts.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the map there, as Markdown or with --json, instead of printing it",
    )
    cli_cost.add_parser(commands)
    cli_export.add_parser(commands)
    commands.add_parser("methods", help="names of the registered attention methods")
    schema = commands.add_parser("schema", help="JSON schema of a config file, for editors")
    schema.add_argument("--sweep", action="store_true", help="of a sweep's file")
    args = parse_with_overrides(parser, argv)
    return guarded(lambda: _COMMANDS[args.command](args))


def _plan(args: argparse.Namespace) -> int:
    import json

    from vit_tucker.build import classes_and_channels
    from vit_tucker.config.load import load_config
    from vit_tucker.errors import ConfigError
    from vit_tucker.models import create_host
    from vit_tucker.patching.patch import plan

    config = load_config(args.cfg, args.overrides)
    if config.attention is None:
        raise ConfigError(f"{args.cfg}: attention: the config patches nothing")
    model = create_host(config.model, *classes_and_channels(config))
    report = plan(model, config.attention, img_size=config.model.img_size)
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    """'4,2' -> (4, 2)"""
    return tuple(int(part) for part in text.split(","))


def _ranks(args: argparse.Namespace) -> int:
    from vit_tucker.analysis.spectra import analyse, save_spectra
    from vit_tucker.attention.options import Calibration
    from vit_tucker.build import analysed_model
    from vit_tucker.paths import refuse_unwritable
    from vit_tucker.report.spectra import draw_spectra, rank_table

    folder = args.out or Path("runs") / f"ranks-{args.model.replace('/', '_').replace(':', '_')}"
    refuse_unwritable("--out", folder, folder=True)
    options = Calibration(images=max(1, args.images))
    model, batches = analysed_model(args.model, args.checkpoint, args.random, args.data, options, args.overrides)
    save_spectra(folder, *analyse(model, batches, options))
    files = [
        draw_spectra(folder, whitened, args.gqa, args.mla) for whitened in ([False, True] if args.data else [False])
    ]
    print(rank_table(folder))
    print(
        f"means over layers (smallest-largest); {folder}/ranks.csv, singular_values.csv, {', '.join(f.name for f in files)}"
    )
    return 0


def _hosts(args: argparse.Namespace) -> int:
    import json

    import timm
    from tqdm import tqdm

    from vit_tucker.analysis.host_map import model_names, survey
    from vit_tucker.errors import ConfigError
    from vit_tucker.paths import refuse_unwritable
    from vit_tucker.report.host_map import document, summary, terminal_map

    names = model_names(args.filter)
    if args.out is not None:
        refuse_unwritable("--out", args.out)
    entries = [entry.to_dict() for entry in survey(tqdm(names, unit="models", disable=None, leave=False))]
    if not entries:
        raise ConfigError(f"none of the {len(names)} models that match '{args.filter}' has attention")
    if args.json:
        text = json.dumps(entries, indent=2) + "\n"
    elif args.out is not None:
        text = document(entries, timm.__version__, args.out.as_posix(), args.filter)
    else:
        text = terminal_map(entries) + "\n"
    if args.out is None:
        print(text, end="")
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    print(f"{args.out}: {summary(entries)}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from vit_tucker.paths import refuse_unwritable
    from vit_tucker.report.compare import comparison, save_comparison

    if args.save is not None:
        refuse_unwritable("--save", args.save, folder=True)
    print(comparison(args.runs))
    if args.save is not None:
        save_comparison(args.runs, args.save)
    return 0


def _methods(args: argparse.Namespace) -> int:
    from vit_tucker import list_methods

    print("\n".join(list_methods()))
    return 0


def _schema(args: argparse.Namespace) -> int:
    import json

    from vit_tucker import attention as attention
    from vit_tucker.config.schema import json_schema
    from vit_tucker.sweep.schema import SweepConfig

    print(json.dumps(SweepConfig.model_json_schema() if args.sweep else json_schema(), indent=2))
    return 0


_COMMANDS = {
    "plan": _plan,
    "ranks": _ranks,
    "hosts": _hosts,
    "compare": _compare,
    "cost": cli_cost.cost,
    "export": cli_export.export,
    "methods": _methods,
    "schema": _schema,
}
