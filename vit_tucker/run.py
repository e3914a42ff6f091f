"""A run from its config to its results, read from top to bottom."""

import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from signal import SIGUSR1
from typing import Any

from accelerate import Accelerator

from vit_tucker.announce import announce, describe_plan, describe_run, measure_latency
from vit_tucker.build import BuiltModel, attention_backends, build_model, classes_and_channels
from vit_tucker.config.load import config_difference, dump_config, load_config
from vit_tucker.config.schema import RunConfig
from vit_tucker.data.check import unreadable
from vit_tucker.data.classes import stored_classes
from vit_tucker.data.faults import FaultLog
from vit_tucker.data.loaders import Loaders, build_loaders
from vit_tucker.data.seeding import derive_seed, seed_everything
from vit_tucker.digests import verify_beside
from vit_tucker.errors import ConfigError, DataError, StoppedError
from vit_tucker.harmless import HARMLESS
from vit_tucker.paths import refuse_unwritable
from vit_tucker.trainer_setup import build_trainer, create_accelerator, weights_header
from vit_tucker.training.engine import evaluate, fit
from vit_tucker.training.interrupt import Signals, catch_signals
from vit_tucker.training.monitor import Monitor
from vit_tucker.training.peers import Peers, one_line
from vit_tucker.training.run_dir import LOGGER, RunDir, setup_console
from vit_tucker.training.trackers import Trackers
from vit_tucker.training.trainer import Trainer
from vit_tucker.weights import full_state, load_weights, save_weights

STREAMS = ("wds", "hfids", "tfds")
"""Data sets whose batches depend on the number of loader workers."""


def run(
    config: RunConfig, evaluate_only: bool = False, allow_changes: bool = False, dry_run: bool = False
) -> dict[str, Any]:
    """Train (or continue, or evaluate) one run.

    Args:
        config: resolved, see ``load_config``. A folder that holds a finished run of the same config is evaluated; an
            unfinished one is continued from its last checkpoint.
        evaluate_only: evaluate the best weights even if the run is not finished.
        allow_changes: continue a folder's run with this config even if it began with another.
        dry_run: print the plan (model, patch, groups, steps, memory) and write nothing.

    Returns:
        The contents of results.json; for an evaluation also ``evaluation``.

    Raises:
        VitTuckerError: bad config, data, checkpoint or patch, before any training.
        StoppedError: by a signal, state saved. FailedError: see ``fit``.
    """
    run_dir = RunDir(Path(str(config.output_dir)))
    accelerator = create_accelerator(config.train, str(config.output_dir))
    setup_console(accelerator.is_main_process)
    peers = Peers(accelerator.process_index, accelerator.num_processes, config.train.timeout_minutes)
    signals = Signals()
    with catch_signals(signals, SIGUSR1):  # whose default is death; the set-up is worth finishing
        try:
            return run_together(config, run_dir, accelerator, peers, signals, evaluate_only, allow_changes, dry_run)
        except StoppedError:
            raise
        except Exception as error:
            if peers.agreed or peers.num_processes == 1:
                raise
            if (other := peers.ask()) is not None:  # contact was lost because another process failed
                raise other from None
            peers.tell(error)
            report_failure(run_dir, peers.rank, error)
            raise


def run_together(
    config: RunConfig,
    run_dir: RunDir,
    accelerator: Accelerator,
    peers: Peers,
    signals: Signals,
    evaluate_only: bool,
    allow_changes: bool,
    dry_run: bool,
) -> dict[str, Any]:
    """The run itself, from its folder to its results; see ``run``."""
    config, changes = peers.together(lambda: check_folder(run_dir, config, allow_changes))
    seed_everything(derive_seed(config.seed))
    finished = run_dir.results.is_file() and not changes and not dry_run
    if finished:
        LOGGER.info(f"{run_dir.path}: finished, so only evaluated; remove the folder to train anew")
    with_train = not (finished or evaluate_only)
    bad = check_images(config, run_dir, peers, with_train) if config.data.check else []
    built, loaders = peers.main_first(lambda: build(config, run_dir, accelerator, with_train))
    loaders.note_bad_images(bad)
    config = config.model_copy(update={"attention": built.attention})
    results = describe_run(config, accelerator, built, loaders)
    if loaders.train is None:
        return evaluate_run(run_dir, built, loaders, accelerator, peers, results)
    steps_per_epoch = loaders.train.steps_per_epoch
    trainer = peers.together(lambda: build_trainer(config, accelerator, peers, run_dir, built, loaders))
    trainer.signals = signals
    trackers = Trackers(accelerator)
    if dry_run:
        announce(config, results, accelerator, built, loaders, trainer)
        LOGGER.info(describe_plan(config, accelerator, built, steps_per_epoch, trainer))
        return results
    peers.on_main(lambda: begin(config, run_dir, built, loaders))
    peers.together(lambda: trackers.start(results["config"], str(config.name)))
    announce(config, results, accelerator, built, loaders, trainer)
    for change in changes:
        LOGGER.info(f"changed: {change}")
    facts = {f"params/{name}": float(built.params[name]) for name in ("attention", "total")}
    start = trainer.progress.global_step
    monitor = Monitor(
        accelerator,
        run_dir,
        config.train,
        steps_per_epoch,
        start,
        facts,
        dump_config(config),
        trainer.groups,
        trackers,
        (built.data["mean"], built.data["std"]),
    )
    try:
        fit(trainer, loaders, monitor)
    finally:
        monitor.close()
        loaders.close()
    results |= {**summarise(trainer), "attention_backends": attention_backends()}
    if accelerator.is_main_process:
        results["cost"]["latency"] = measure_latency(config, accelerator, built, trainer.bare)
        run_dir.write_results(results)
    best, params = results["best"], built.params
    LOGGER.info(
        f"done: best top-1 {best['top1']:.2f}% (epoch {best['epoch']}), {params['attention']:,} attention parameters of "
        f"{params['total']:,}, {results['train_seconds']:.0f} s; results in {run_dir.path}"
    )
    return results


def build(config: RunConfig, run_dir: RunDir, accelerator: Accelerator, with_train: bool) -> tuple[BuiltModel, Loaders]:
    """Model and loaders of one process."""
    built = build_model(config, run_dir, accelerator.device, training=with_train)
    loaders = build_loaders(
        config.data,
        config.train,
        built.data,
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
        with_train=with_train,
        device=accelerator.device,
        classes=stored_classes(run_dir.path),
        num_classes=built.num_classes,
    )
    return built, loaders


def check_images(config: RunConfig, run_dir: RunDir, peers: Peers, with_train: bool) -> list[str]:
    """Open every image of the run's splits, shared among the processes; streams are only seen as they are read.

    Returns:
        The fault lines of the bad ones, of all processes.

    Raises:
        DataError: more of them than ``data.max_bad_images``; each has a line in the log.
    """
    stored = stored_classes(run_dir.path)
    num_classes, channels = peers.together(lambda: classes_and_channels(config, stored))
    place = peers.rank, peers.num_processes
    bad = peers.union(
        peers.together(lambda: unreadable(config.data, channels, with_train, stored, num_classes, *place))
    )
    try:
        peers.together(lambda: FaultLog(config.data.max_bad_images).add(bad))
    except DataError:
        for line in bad:
            LOGGER.warning(f"bad image: {line}")
        raise
    return bad


def begin(config: RunConfig, run_dir: RunDir, built: BuiltModel, loaders: Loaders) -> None:
    """Write what a run starts with."""
    run_dir.start(dump_config(config), built.patch, built.data, loaders.label_names)
    if built.teacher is not None and not run_dir.teacher.is_file():
        save_weights(run_dir.teacher, full_state(built.teacher), weights_header(config.model.name, None))


def report_failure(run_dir: RunDir, rank: int, error: Exception) -> None:
    """Have the failure of one process among several in train.log, and on standard error where the first one does not say it."""
    line = f"process {rank} failed: {one_line(error)}"
    run_dir.log_failure(line)
    if rank != 0:
        print(f"error: {line}", file=sys.stderr, flush=True)


def check_folder(run_dir: RunDir, config: RunConfig, allow_changes: bool = False) -> tuple[RunConfig, list[str]]:
    """Refuse a folder that holds a run of another config, or that can't be made.

    Returns:
        The config, with the ranks that a rank rule chose when the run began; and what has changed since then that matters.

    Raises:
        ConfigError: with the differences, or what is in the way.
    """
    if not run_dir.config.is_file():
        refuse_unwritable("output_dir", run_dir.path, folder=True)
        return config, []
    stored = load_config(run_dir.config)
    changes = changes_of_run(stored, config)
    if changes and not allow_changes:
        raise ConfigError(
            f"{run_dir.path} holds a run with another config: {'; '.join(changes)}; choose another output_dir=, remove that "
            "folder, or continue it with this config by --allow-changes"
        )
    if config.attention is not None and any(line.startswith("attention.") for line in changes):
        return config, changes
    return config.model_copy(update={"attention": stored.attention}), changes


def changes_of_run(stored: RunConfig, config: RunConfig) -> list[str]:
    """What differs between the config of a run that began and another, and matters: not the ranks that a rule chose.

    Returns:
        Lines 'train.lr: 0.001 -> 0.002'.
    """
    chosen, given = stored.attention, config.attention
    if chosen is not None and (given is None or given == given.without_choices()):  # it names no chosen ranks
        stored = stored.model_copy(update={"attention": chosen.without_choices()})
    streamed = config.data.dataset.partition("/")[0] in STREAMS
    harmless = HARMLESS - ({"data.num_workers"} if streamed else set())
    return [line for line in config_difference(stored, config) if line.partition(":")[0] not in harmless]


def summarise(trainer: Trainer) -> dict[str, Any]:
    """What results.json says of the training itself."""
    progress = trainer.progress
    return {
        "epochs": progress.epoch,
        "best": progress.best,
        "last": progress.rows[-1],
        "curve": progress.rows,
        "bad_images": progress.faults,
        "train_seconds": progress.seconds,
        "images_per_second": progress.global_step * trainer.config.global_batch_size / max(progress.seconds, 1e-9),
        "finished": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def evaluate_run(
    run_dir: RunDir,
    built: BuiltModel,
    loaders: Loaders,
    accelerator: Accelerator,
    peers: Peers,
    results: dict[str, Any],
) -> dict[str, Any]:
    """Scores of a run's best weights; of the model as created (dense weights, converted) if nothing was trained."""
    for note in loaders.notes:
        LOGGER.info(note)
    which = "the model as created"
    if run_dir.best.is_file():
        peers.together(lambda: verify_beside(run_dir.best))
        peers.together(lambda: load_weights(run_dir.best, built.model))
        which = str(run_dir.best)
    scores = evaluate(built.model, loaders, accelerator, peers)
    LOGGER.info(
        f"{which}: top-1 {scores.top1:.2f}%  top-5 {scores.top5:.2f}%  loss {scores.loss:.4f}  {scores.count} images"
    )
    return {**results, "evaluation": asdict(scores)}
