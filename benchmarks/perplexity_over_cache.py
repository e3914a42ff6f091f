"""Perplexity of a converted language model over the bytes of its KV cache: our methods and published ones, at equal cache.

    python benchmarks/perplexity_over_cache.py MODEL --text FILE --save benchmarks/results/language_models
    python benchmarks/perplexity_over_cache.py MODEL --text FILE --save ... --heal --shares 0.25  # 200 steps, three seeds

MODEL is a folder or a name of a LLaMA-like model, in a GGUF file with ``--gguf-file``. Conversions see the text's first tokens,
the test is its last blocks, healing trains on what lies between. A method's variants (how many pairs rotate, ranks by layer) are
chosen by their loss on calibration tokens. Each cell is a JSON file in FOLDER/cells: what is there is not computed again; the
table and the figure are made of all cells that are there. Seconds of a full run are estimated and printed first.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from lm_baselines.cells import DENSE, healed, one_shot, read_cell, step_seconds, write_cell
from lm_baselines.chat import save_answers
from lm_baselines.energy import key_energies
from lm_baselines.methods import METHODS, Source, rebuild
from lm_baselines.moments import attention_layers, dense_entries
from lm_baselines.padding import padding_rows
from lm_baselines.shrink import imported
from lm_baselines.summary import save_summary
from lm_baselines.text import Splits, split_text
from torch import nn

from vit_tucker.errors import ConfigError, FailedError
from vit_tucker.run.status import guarded
from vit_tucker.storage.paths import refuse_unwritable


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the arguments."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", help="folder or name of a LLaMA-like model")
    made.add_argument("--gguf-file", help="in that folder")
    made.add_argument("--text", type=Path, required=True, help="prose in UTF-8")
    made.add_argument("--save", type=Path, required=True, metavar="FOLDER")
    made.add_argument("--methods", nargs="+", choices=[DENSE, *METHODS], default=[DENSE, *METHODS])
    made.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.25, 0.125], help="of the dense cache")
    made.add_argument("--length", type=int, default=256, help="tokens of a block")
    made.add_argument("--calibration-tokens", type=int, default=16_000)
    made.add_argument("--choice-blocks", type=int, default=8, help="calibration blocks that choose among variants")
    made.add_argument("--test-blocks", type=int, default=24)
    made.add_argument("--heal", action="store_true", help="also train the converted models")
    made.add_argument("--steps", type=int, default=200)
    made.add_argument("--batch-size", type=int, default=1, help="blocks of a step")
    made.add_argument(
        "--lrs", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3], help="the first seed's best one is taken"
    )
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument(
        "--train", choices=["attention", "all"], default="attention", help="which parameters healing trains"
    )
    made.add_argument(
        "--precision", choices=["fp32", "bf16"], default="bf16", help="of products in healing; parameters are in fp32"
    )
    made.add_argument("--chat", action="store_true", help="also keep what the host and Tucker's models answer")
    made.add_argument("--threads", type=int, help="of torch")
    return made


def load(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Returns the model in float32 and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {} if args.gguf_file is None else {"gguf_file": args.gguf_file}
    try:
        read = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(args.model, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{args.model}: {str(error).splitlines()[0]}") from None
    if hasattr(
        read.config, "quantization_config"
    ):  # of a GGUF file: save_pretrained, which cacheshrink needs, refuses it
        del read.config.quantization_config
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    return model.eval(), tokenizer


def settings_of(args: argparse.Namespace, splits: Splits, healing: bool) -> dict[str, Any]:
    """Returns what a cell's values depend on, beside its method.

    Args:
        args: of the command.
        splits: of the text.
        healing: with those of the training.
    """
    found: dict[str, Any] = {
        "model": Path(args.model).name, "tokens": splits.digest, "length": args.length, "test_blocks": args.test_blocks,
        "calibration_blocks": len(splits.calibration), "choice_blocks": args.choice_blocks,
    }  # fmt: skip
    if healing:
        found |= {"steps": args.steps, "batch_size": args.batch_size, "train": args.train,
                  "precision": args.precision}  # fmt: skip
    return found


def cells_of(args: argparse.Namespace, model: nn.Module) -> list[tuple[str, int]]:
    """Returns methods and numbers of cache entries; cacheshrink is left out, with a line that says so, where it isn't there.

    Args:
        args: of the command.
        model: dense.
    """
    full, methods = dense_entries(model), list(args.methods)
    try:
        imported()
    except ConfigError as error:
        if "cacheshrink" in methods:
            print(f"cacheshrink is left out: {error}", flush=True)
        args.methods = methods = [method for method in methods if method != "cacheshrink"]
    shares = [round(share * full) // 2 * 2 for share in args.shares]
    return [(method, entries) for method in methods for entries in ([full] if method == DENSE else shares)]


def measure(args: argparse.Namespace, source: Source, splits: Splits) -> None:
    """Computes all cells that aren't there, one at a time.

    Args:
        args: of the command.
        source, splits: model and text.
    """
    folder, settings = args.save / "cells", settings_of(args, splits, False)
    cells = cells_of(args, source.model)
    print_estimate(args, source, splits, sum(not (folder / f"{m}_{e}.json").exists() for m, e in cells), len(cells))
    check_energies(args, source, splits)
    for method, entries in cells:
        stem, model = f"{method}_{entries}", None
        cell = read_cell(folder / f"{stem}.json", settings)
        if cell is None:
            cell, model = one_shot(folder / f"{stem}.json", settings, source, splits, method, entries)
            print(stem, cell["perplexity"], cell["variant"], flush=True)
        if args.chat and method in (DENSE, "Tucker") and (model is not None or method == DENSE):
            save_answers(folder / f"{stem}.json", settings, model or source.model, source.tokenizer, cell)
        if args.heal and cell["perplexity"] is not None:
            heal_cells(args, source, splits, folder / stem, cell, model)


def heal_cells(
    args: argparse.Namespace, source: Source, splits: Splits, stem: Path, cell: dict[str, Any], model: nn.Module | None
) -> None:
    """Heals one converted model with all rates at the first seed, and with the best one at the others.

    Args:
        args: of the command.
        source, splits: model and text.
        stem: of the cells' files.
        cell: the one-shot cell.
        model: converted; None where the cell was read and it must be converted again.
    """
    settings = settings_of(args, splits, True)
    losses: dict[float, float] = {}
    for seed in args.seeds:
        rates = args.lrs if seed == args.seeds[0] else [min(losses, key=lambda lr: losses[lr])]
        for lr in rates:
            file = stem.with_name(f"{stem.name}_healed_lr{lr:g}_seed{seed}.json")
            found = read_cell(file, settings)
            if found is None:
                if model is None and cell["method"] == DENSE:
                    model = source.model
                elif model is None:
                    model = rebuild(source, cell["method"], cell["entries"], cell["variant"])
                found, trained = healed(file, settings, model, splits, cell, lr, seed)
                best = found["validation_loss"] < min(losses.values(), default=float("inf"))
                if args.chat and cell["method"] == "Tucker" and seed == args.seeds[0] and best:
                    save_answers(stem.with_name(f"{stem.name}_healed.json"), settings, trained, source.tokenizer, found)
                print(file.stem, found["perplexity"], f"{found['seconds_per_step']} s per step", flush=True)
            losses.setdefault(lr, found["validation_loss"])


def check_energies(args: argparse.Namespace, source: Source, splits: Splits) -> None:
    """Writes what complex and real bases hold of each layer's keys, and checks that no real one holds more.

    Args:
        args: of the command.
        source, splits: model and text.
    """
    file, settings = args.save / "cells" / "rotation_energy.json", settings_of(args, splits, False)
    if read_cell(file, settings) is not None:
        return
    rows = []
    for layer, (attention, moment) in enumerate(zip(attention_layers(source.model), source.known(), strict=True)):
        found = key_energies(attention, moment)
        if bool((found.complex < found.real - 1e-12).any()):
            raise FailedError(f"layer {layer}: a real basis holds more energy than the complex one")
        kept = attention.head_dim // 2
        rows.append({"layer": layer, "components": kept, "complex": found.complex[kept - 1].item(),
                     "real": found.real[kept - 1].item()})  # fmt: skip
    write_cell(file, settings, rows=rows)


def check_padding(args: argparse.Namespace, source: Source, splits: Splits) -> None:
    """Writes what caches and left padding do to the host's logits and to cacheshrink's, if that is among the methods.

    Args:
        args: of the command.
        source, splits: model and text.
    """
    file, settings = args.save / "cells" / "cacheshrink_padding.json", settings_of(args, splits, False)
    if "cacheshrink" in args.methods and read_cell(file, settings) is None:
        write_cell(file, settings, rows=padding_rows(source, splits.test[0, :24]))


def print_estimate(args: argparse.Namespace, source: Source, splits: Splits, missing: int, cells: int) -> None:
    """Prints the seconds that a run takes, by those of one block and of one step.

    Args:
        args: of the command.
        source, splits: model and text.
        missing: one-shot cells that aren't there.
        cells: of all methods, to be healed from nothing.
    """
    if not missing and not args.heal:
        return
    evaluated, trained = step_seconds(source.model, splits, settings_of(args, splits, True))
    variants = 6  # of a method, on average
    one = evaluated * (missing * (variants * args.choice_blocks + args.test_blocks) + 2 * len(splits.calibration))
    text = f"a block takes {evaluated:.2f} s, so {missing} one-shot cells {one / 60:.0f} minutes, and ours their calibration"
    if args.heal:
        runs = cells * (len(args.lrs) + len(args.seeds) - 1)
        text += f"; a step takes {trained:.1f} s, so {runs} healings from nothing {runs * args.steps * trained / 3600:.1f} hours"
    print(text, flush=True)


def main() -> int:
    """Computes what is missing, and writes table and figure; returns the exit status."""
    args = parser().parse_args()

    def run() -> int:
        refuse_unwritable("--save", args.save, folder=True)
        if not all(0 < share <= 1 for share in args.shares):
            raise ConfigError(f"--shares: between 0 and 1, not {args.shares}")
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        model, tokenizer = load(args)
        splits = split_text(
            args.text, tokenizer, args.calibration_tokens, args.length, args.choice_blocks, args.test_blocks
        )
        (args.save / "cells").mkdir(parents=True, exist_ok=True)
        source = Source(model, tokenizer, splits.calibration)
        measure(args, source, splits)
        check_padding(args, source, splits)
        save_summary(args.save)
        return 0

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
