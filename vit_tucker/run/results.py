"""Results of a run: results.json of its training, or scores of its weights."""

from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from vit_tucker.checkpoint.host_model import count_parameters
from vit_tucker.config.schema import RunConfig
from vit_tucker.data.loaders import Loaders
from vit_tucker.patching.patch import patch_record
from vit_tucker.run.builders import builder_of
from vit_tucker.run.built import BuiltModel
from vit_tucker.run.describe import latency_of_run
from vit_tucker.run.folder import unwritable
from vit_tucker.storage.digests import verify_beside
from vit_tucker.storage.run_dir import LOGGER
from vit_tucker.storage.weights import load_weights
from vit_tucker.training.coordination import Coordinator
from vit_tucker.training.engine import evaluate
from vit_tucker.training.trainer import Trainer


def finish_run(
    config: RunConfig, trainer: Trainer, built: BuiltModel, results: dict[str, Any], backends: list[str]
) -> dict[str, Any]:
    """Writes the results of a run that has been trained, on the first process.

    Args:
        config, trainer, built: of the run.
        results: see ``describe_run``.
        backends: what computed the attention, and why.

    Returns:
        ``results`` with what the training gave.

    Raises:
        SaveError: they can't be written.
    """
    run_dir, accelerator = trainer.run_dir, trainer.accelerator
    results |= {**summarise(trainer), **resized(config, trainer.bare, built, results), "attention_backends": backends}
    if accelerator.is_main_process:
        results["cost"]["latency"] = latency_of_run(config, accelerator, built, trainer.bare)
        try:
            run_dir.write_results(results)
        except OSError as error:
            raise unwritable(run_dir.results, error) from error
    best, params = results["best"], results["params"]
    decides = trainer.task.measures[0]
    score = f"best {decides.text(best[decides.name])} (epoch {best['epoch']})" if best else "the best weights were lost"
    LOGGER.info(
        f"done: {score}, {params['attention']:,} attention parameters of {params['total']:,}, "
        f"{results['train_seconds']:.0f} s; results in {run_dir.path}"
    )
    return results


def resized(config: RunConfig, model: nn.Module, built: BuiltModel, results: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries of results.json that changed with the ranks of a model by its step rule; empty where none did.

    Args:
        config: of the run.
        model: as trained.
        built: before the training.
        results: before the training; layers of their old size keep their row, with the errors of their conversion.
    """
    record, stated = patch_record(model), results["patch"]
    if record is None or stated is None:
        return {}
    now = record.report.to_dict()
    rows = {row["name"]: row for row in stated["layers"]}
    sizes = ("params_after", "flops_after")
    kept = [rows[row["name"]] if all(row[k] == rows[row["name"]][k] for k in sizes) else row for row in now["layers"]]
    if kept == stated["layers"]:
        return {}
    total, attention = count_parameters(model)
    return {
        "patch": {**now, "layers": kept},
        "params": {**results["params"], "total": total, "attention": attention},
        "cost": builder_of(config).cost(built, model),
    }


def summarise(trainer: Trainer) -> dict[str, Any]:
    """Returns the entries of results.json on the training itself."""
    progress, task = trainer.progress, trainer.task
    done = progress.global_step * trainer.config.global_batch_size * task.units
    return {
        "epochs": progress.epoch,
        "best": progress.best,
        "last": progress.rows[-1],
        "curve": progress.rows,
        "bad_images": progress.faults,
        "train_seconds": progress.seconds,
        f"{task.unit}_per_second": done / max(progress.seconds, 1e-9),
        "finished": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def evaluate_run(
    weights: Path | None,
    built: BuiltModel,
    loaders: Loaders,
    accelerator: Accelerator,
    coordinator: Coordinator,
    results: dict[str, Any],
) -> dict[str, Any]:
    """Evaluates a run's weights; the model as created (dense weights, converted) if nothing was trained.

    Other arguments as of ``build_trainer``.

    Args:
        weights: file of the best or last weights; None for the model as created.
        results: from ``describe_run``.
    """
    for note in loaders.notes:
        LOGGER.info(note)
    which = "the model as created"
    if weights is not None:
        coordinator.together(lambda: verify_beside(weights))
        coordinator.together(lambda: load_weights(weights, built.model))
        which = str(weights)
    task = built.task
    scores = evaluate(built.model, task, loaders, accelerator, coordinator)
    found = [(measure, getattr(scores, measure.name)) for measure in task.measures]
    shown = "  ".join(measure.text(value) for measure, value in found if value is not None)
    LOGGER.info(f"{which}: {shown}  loss {scores.loss:.4f}  {scores.count} {task.unit}")
    return {**results, "evaluation": asdict(scores)}
