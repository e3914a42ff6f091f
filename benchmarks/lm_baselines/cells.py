"""One cell of the comparison: a method at a number of cache entries, one-shot or healed, as a JSON file of its own."""

import copy
import json
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lm_baselines.caching import cached_entries
from lm_baselines.healing import attention_parameters, heal
from lm_baselines.methods import Source, best_variant
from lm_baselines.moments import decoder_layers, dense_entries
from lm_baselines.text import Splits, scored
from vit_tucker import __version__
from vit_tucker.errors import ConfigError

DENSE = "dense"
BYTES = 2
"""Of an entry, in bfloat16."""


def versions() -> dict[str, str]:
    """Returns the versions of what computes."""
    return {"vit_tucker": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version()}  # fmt: skip


def write_cell(file: Path, settings: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Writes a cell with its settings and versions, at once, and returns it.

    Args:
        file: its path.
        settings: what it depends on.
        values: what was found.
    """
    cell = {**values, "settings": settings, "versions": versions(), "date": date.today().isoformat()}
    part = file.with_suffix(".part")
    part.write_text(json.dumps(cell, indent=1) + "\n")
    part.replace(file)
    return cell


def read_cell(file: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Returns a cell that is there, or None.

    Args:
        file: its path.
        settings: what it must depend on.

    Raises:
        ConfigError: it was made with other settings.
    """
    if not file.exists():
        return None
    cell = json.loads(file.read_text())
    for key, value in settings.items():
        if cell["settings"].get(key) != value:
            raise ConfigError(
                f"{file}: made with {key} {cell['settings'].get(key)}, not {value}: another --save, or remove it"
            )
    return cell


def one_shot(
    file: Path, settings: dict[str, Any], source: Source, splits: Splits, method: str, entries: int
) -> tuple[dict[str, Any], nn.Module | None]:
    """Converts, evaluates and writes a cell; returns it with its model, which is None where the method has no such form.

    Args:
        file, settings: see ``write_cell``.
        source, splits: model and text.
        method: of ``METHODS``, or dense.
        entries: cached per token and layer.
    """
    started = time.perf_counter()
    variants: list[dict[str, Any]] = []
    model: nn.Module | None = source.model
    if method != DENSE:
        model, variants = best_variant(source, method, entries, settings["choice_blocks"])
    seconds = time.perf_counter() - started
    best = min(variants, key=lambda row: row["calibration_loss"], default=None)
    values: dict[str, Any] = {
        "method": method,
        "entries": entries,
        "stage": "one-shot",
        "variant": best,
        "variants": variants,
    }
    if model is None:
        return write_cell(file, settings, **values, perplexity=None), None
    dense = sum(p.numel() for p in attention_parameters(source.model))
    parameters = sum(p.numel() for p in attention_parameters(model))
    cached = cached_entries(model)
    values |= {
        "cached_entries": cached,
        "cache_share": cached / dense_entries(source.model),
        "cache_bytes": round(cached * len(decoder_layers(model)) * BYTES),
        "attention_params": parameters,
        "params_share": parameters / dense,
        "conversion_seconds": round(seconds, 1),
    }
    return write_cell(file, settings, **values, perplexity=scored(model, splits.test).perplexity), model


def healed(
    file: Path, settings: dict[str, Any], model: nn.Module, splits: Splits, start: dict[str, Any], lr: float, seed: int
) -> tuple[dict[str, Any], nn.Module]:
    """Trains a copy of a converted model, evaluates it, writes the cell, and returns both.

    Args:
        file, settings: see ``write_cell``.
        model: converted; not changed.
        splits: of the text.
        start: the one-shot cell.
        lr, seed: of the training.
    """
    model, started, losses = copy.deepcopy(model), time.perf_counter(), []
    heal(
        model, splits.training, steps=settings["steps"], batch_size=settings["batch_size"], lr=lr, seed=seed,
        everything=settings["train"] == "all", bf16=settings["precision"] == "bf16",
        note=lambda step, loss: losses.append(round(loss, 4)),
    )  # fmt: skip
    seconds = time.perf_counter() - started
    kept = (
        "method",
        "entries",
        "cached_entries",
        "cache_share",
        "cache_bytes",
        "attention_params",
        "params_share",
        "variant",
    )
    cell = write_cell(
        file, settings, **{key: start[key] for key in kept}, stage="healed", lr=lr, seed=seed, losses=losses,
        validation_loss=scored(model, splits.validation).loss, perplexity=scored(model, splits.test).perplexity,
        seconds_per_step=round(seconds / settings["steps"], 2),
    )  # fmt: skip
    return cell, model


def step_seconds(model: nn.Module, splits: Splits, settings: dict[str, Any]) -> tuple[float, float]:
    """Returns seconds of one evaluated block and of one training step, measured on a copy.

    Args:
        model: dense.
        splits: of the text.
        settings: of the training.
    """
    started = time.perf_counter()
    scored(model, splits.test[:4])
    evaluated = (time.perf_counter() - started) / len(splits.test[:4])
    trained = copy.deepcopy(model)
    started = time.perf_counter()
    heal(trained, splits.training, steps=1, batch_size=settings["batch_size"], lr=0.0, seed=0,
         bf16=settings["precision"] == "bf16")  # fmt: skip
    return evaluated, time.perf_counter() - started
