"""A run from its config to its results, read from top to bottom."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGUSR1
from typing import Any

from accelerate import Accelerator

from vit_tucker.attention.backends import Choices, recorded_choices
from vit_tucker.config.load import dump_config
from vit_tucker.config.schema import RunConfig
from vit_tucker.data.loaders import Loaders
from vit_tucker.data.seeding import derive_seed, seed_everything
from vit_tucker.errors import StoppedError
from vit_tucker.run.accelerator import create_accelerator
from vit_tucker.run.builders import builder_of
from vit_tucker.run.built import BuiltModel
from vit_tucker.run.describe import describe_plan, describe_run, hyperparameters, log_run
from vit_tucker.run.folder import Claim, record_failure, weights_to_evaluate
from vit_tucker.run.results import evaluate_run, finish_run
from vit_tucker.run.same_run import check_folder
from vit_tucker.run.trainer import build_trainer
from vit_tucker.show.progress_bars import showing_progress
from vit_tucker.storage.run_dir import LOGGER, RunDir, log_lines
from vit_tucker.training.coordination import Coordinator
from vit_tucker.training.engine import fit
from vit_tucker.training.interrupt import Signals, catch_signals
from vit_tucker.training.launcher import launcher_process, leaving_with_launcher
from vit_tucker.training.monitor import Monitor, NullMonitor
from vit_tucker.training.quick_check import for_quick_check, quick_check, scratch_folder
from vit_tucker.training.step import StepRule
from vit_tucker.training.trackers import Trackers


@dataclass(frozen=True)
class Request:
    """The arguments of ``run`` beside the config."""

    evaluate_only: bool
    allow_changes: bool
    dry_run: bool
    step_rule: StepRule | None
    monitor: NullMonitor | None
    quick_check: bool
    notes: Sequence[str]


def run(
    config: RunConfig,
    evaluate_only: bool = False,
    allow_changes: bool = False,
    dry_run: bool = False,
    step_rule: StepRule | None = None,
    monitor: NullMonitor | None = None,
    quick_check: bool = False,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains (or continues, or evaluates) one run.

    Args:
        config: resolved, see ``load_config``. A folder that holds a finished run of the same config is evaluated; an
            unfinished one is continued from its last checkpoint.
        evaluate_only: evaluate the best weights even if the run is not finished.
        allow_changes: continue a folder's run with this config even if it began with another.
        dry_run: print the plan (model, patch, groups, steps, memory) and write nothing.
        step_rule: an object in place of what ``train.step_rule`` names, which no config names: for tests.
        monitor: shows the run in place of console, TensorBoard and trackers.
        quick_check: see ``vit_tucker.training.quick_check``; the run's own folder is neither read nor written.
        notes: lines for the log about the config, see ``read_config``.

    Returns:
        The contents of results.json; for an evaluation also ``evaluation``; for a dry run or a quick check what is known
        before the training.

    Raises:
        VitTuckerError: bad config, data, checkpoint or patch, before any training.
        StoppedError: by a signal, state saved. FailedError: see ``fit``.
    """
    request = Request(evaluate_only and not quick_check, allow_changes, dry_run, step_rule, monitor, quick_check, notes)
    folder = Path(str(config.output_dir))
    if not quick_check:
        return run_in(folder, config, request)
    with scratch_folder(folder) as scratch:
        return run_in(scratch, for_quick_check(config), request)


def run_in(folder: Path, config: RunConfig, request: Request) -> dict[str, Any]:
    """Runs a config in a folder, on as many processes as were launched.

    Args:
        folder: of the run.
        config: see ``run``.
        request: its other arguments.

    Returns:
        What ``run`` does, and it raises the same.
    """
    claim, signals = Claim(RunDir(folder)), Signals()
    with leaving_with_launcher(launcher_process()):
        accelerator = create_accelerator(config.train, str(folder))
        coordinator = Coordinator(accelerator.process_index, accelerator.num_processes, config.train.timeout_minutes)
        # SIGUSR1's default is death; the set-up is worth finishing
        with log_lines(accelerator.is_main_process), catch_signals(signals, SIGUSR1), recorded_choices() as used:
            try:
                return run_together(config, claim, accelerator, coordinator, signals, request, used)
            except StoppedError:
                raise
            except Exception as error:
                lost = coordinator.num_processes > 1 and not coordinator.agreed
                if lost and (other := coordinator.ask()) is not None:  # contact was lost because another process failed
                    raise other from None
                if lost:
                    coordinator.tell(error)
                record_failure(claim, coordinator, error)
                raise
            finally:
                claim.lock.release()


def run_together(
    config: RunConfig,
    claim: Claim,
    accelerator: Accelerator,
    coordinator: Coordinator,
    signals: Signals,
    request: Request,
    used: Choices,
) -> dict[str, Any]:
    """Runs a config from its folder to its results, see ``run``.

    Args:
        config: validated.
        claim: on the run's folder.
        accelerator, coordinator: of the processes.
        signals: that ask this process to stop.
        request: the other arguments of ``run``.
        used: filled with the attention backends that compute the run's calls.
    """
    run_dir = claim.run_dir
    config, changes, with_train = enter_folder(config, claim, coordinator, request)
    weights = None if with_train else coordinator.on_main(lambda: weights_to_evaluate(run_dir))
    builder = coordinator.together(lambda: builder_of(config))
    bad = builder.check(config, run_dir, coordinator, with_train) if config.data.check else []
    built, loaders = coordinator.main_first(lambda: build_run(config, run_dir, accelerator, with_train))
    loaders.note_bad_images(bad)
    config = config.model_copy(update={"attention": built.attention})
    kept, started = claim.kept_config(config)
    results = describe_run(kept, accelerator, built, loaders)
    if loaders.train is None:
        return evaluate_run(weights, built, loaders, accelerator, coordinator, results)
    steps = loaders.train.steps_per_epoch
    rule = request.step_rule
    trainer = coordinator.together(
        lambda: build_trainer(config, accelerator, coordinator, run_dir, built, loaders, rule)
    )
    trainer.signals = signals
    if request.dry_run or request.quick_check:
        log_run(config, results, accelerator, built, loaders, trainer, request.notes)
        try:
            if request.dry_run:
                LOGGER.info(describe_plan(config, accelerator, built, steps, trainer))
            else:
                results["quick_check"] = quick_check(trainer, loaders)
                LOGGER.info(results["quick_check"])
        finally:
            loaders.close()
        return results
    if run_dir.config.is_file() and not run_dir.begun:
        LOGGER.info(f"{run_dir.path}: an earlier start left no checkpoint, so the run begins anew")
    coordinator.on_main(lambda: claim.begin(kept, started, built, loaders))
    claim.begun = True
    trackers = Trackers(accelerator)
    coordinator.together(lambda: trackers.start(results["config"], str(config.name)))
    log_run(config, results, accelerator, built, loaders, trainer, request.notes)
    for change in changes:
        LOGGER.info(f"changed: {change}")
    facts = {f"params/{name}": float(built.params[name]) for name in ("attention", "total")}
    shown = trackers, hyperparameters(config)
    monitor = request.monitor or Monitor(trainer, steps, facts, dump_config(config), *shown)
    try:
        fit(trainer, loaders, monitor)
    finally:
        monitor.close()
        loaders.close()
    return finish_run(config, trainer, built, results, used.lines())


def enter_folder(
    config: RunConfig, claim: Claim, coordinator: Coordinator, request: Request
) -> tuple[RunConfig, list[str], bool]:
    """Locks a run's folder where it is to be trained; arguments as of ``run_together``.

    Returns:
        The config to go on with, what has changed in it since the run began, and whether there is anything to train.

    Raises:
        ConfigError: the folder holds another run, or another process trains there.
    """
    run_dir, dry_run = claim.run_dir, request.dry_run
    if not request.evaluate_only and not coordinator.on_main(run_dir.results.is_file):
        claim.take(coordinator, dry_run)
    config, changes = coordinator.together(lambda: check_folder(run_dir, config, request.allow_changes))
    seed_everything(derive_seed(config.seed))
    finished = run_dir.results.is_file() and not changes and not dry_run
    if finished:
        LOGGER.info(f"{run_dir.path}: finished, so only evaluated; remove the folder to train anew")
    with_train = not (finished or request.evaluate_only)
    if with_train:
        claim.take(coordinator, dry_run)
    else:
        claim.lock.release()
    return config, changes, with_train


def build_run(
    config: RunConfig, run_dir: RunDir, accelerator: Accelerator, with_train: bool
) -> tuple[BuiltModel, Loaders]:
    """Builds model and loaders of one process.

    Args:
        config: validated.
        run_dir: its folder.
        accelerator: of this process.
        with_train: open the training split too.
    """
    builder = builder_of(config)
    with showing_progress(None if accelerator.is_main_process else False):
        built = builder.model(config, run_dir, accelerator.device, with_train)
    return built, builder.loaders(config, run_dir, accelerator, built, with_train)
