"""A run from its config to its results, read from top to bottom."""

from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from signal import SIGUSR1
from typing import Any

from accelerate import Accelerator

from vit_tucker.attention.backends import Choices, recorded_choices
from vit_tucker.config.load import dump_config
from vit_tucker.config.schema import RunConfig
from vit_tucker.data.check import unreadable
from vit_tucker.data.classes import stored_classes
from vit_tucker.data.faults import FaultLog
from vit_tucker.data.loaders import Loaders, build_loaders
from vit_tucker.data.seeding import derive_seed, seed_everything
from vit_tucker.errors import DataError, StoppedError
from vit_tucker.run.describe import announce, describe_plan, describe_run, measure_latency
from vit_tucker.run.folder import Claim, record_failure, unwritable, weights_to_evaluate
from vit_tucker.run.model import BuiltModel, build_model, classes_and_channels
from vit_tucker.run.same_run import check_folder
from vit_tucker.run.trainer import build_trainer, create_accelerator
from vit_tucker.storage.digests import verify_beside
from vit_tucker.storage.run_dir import LOGGER, RunDir, log_lines
from vit_tucker.storage.weights import load_weights
from vit_tucker.training.engine import evaluate, fit
from vit_tucker.training.interrupt import Signals, catch_signals
from vit_tucker.training.launcher import launcher_process, leaving_with_launcher
from vit_tucker.training.monitor import Monitor
from vit_tucker.training.peers import Peers
from vit_tucker.training.trackers import Trackers
from vit_tucker.training.trainer import Trainer


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
    with leaving_with_launcher(launcher_process()):
        return _run(config, evaluate_only, allow_changes, dry_run)


def _run(config: RunConfig, evaluate_only: bool, allow_changes: bool, dry_run: bool) -> dict[str, Any]:
    """``run``, whose failures are told to the other processes and to train.log."""
    claim = Claim(RunDir(Path(str(config.output_dir))))
    accelerator = create_accelerator(config.train, str(config.output_dir))
    peers = Peers(accelerator.process_index, accelerator.num_processes, config.train.timeout_minutes)
    signals = Signals()
    # SIGUSR1's default is death; the set-up is worth finishing
    with log_lines(accelerator.is_main_process), catch_signals(signals, SIGUSR1), recorded_choices() as used:
        try:
            return run_together(config, claim, accelerator, peers, signals, used, evaluate_only, allow_changes, dry_run)
        except StoppedError:
            raise
        except Exception as error:
            lost = peers.num_processes > 1 and not peers.agreed
            if lost and (other := peers.ask()) is not None:  # contact was lost because another process failed
                raise other from None
            if lost:
                peers.tell(error)
            record_failure(claim, peers, error)
            raise
        finally:
            claim.lock.release()


def run_together(
    config: RunConfig,
    claim: Claim,
    accelerator: Accelerator,
    peers: Peers,
    signals: Signals,
    used: Choices,
    evaluate_only: bool,
    allow_changes: bool,
    dry_run: bool,
) -> dict[str, Any]:
    """The run itself, from its folder to its results; see ``run``. ``used``: the attention backends that take its calls."""
    run_dir = claim.run_dir
    if not evaluate_only and not peers.on_main(run_dir.results.is_file):
        claim.take(peers, dry_run)
    config, changes = peers.together(lambda: check_folder(run_dir, config, allow_changes))
    seed_everything(derive_seed(config.seed))
    finished = run_dir.results.is_file() and not changes and not dry_run
    with_train, weights = not (finished or evaluate_only), None
    if finished:
        LOGGER.info(f"{run_dir.path}: finished, so only evaluated; remove the folder to train anew")
    if with_train:
        claim.take(peers, dry_run)
    else:
        claim.lock.release()
        weights = peers.on_main(lambda: weights_to_evaluate(run_dir))
    bad = check_images(config, run_dir, peers, with_train) if config.data.check else []
    built, loaders = peers.main_first(lambda: build(config, run_dir, accelerator, with_train))
    loaders.note_bad_images(bad)
    config = config.model_copy(update={"attention": built.attention})
    kept, started = claim.kept_config(config)
    results = describe_run(kept, accelerator, built, loaders)
    if loaders.train is None:
        return evaluate_run(weights, built, loaders, accelerator, peers, results)
    steps_per_epoch = loaders.train.steps_per_epoch
    trainer = peers.together(lambda: build_trainer(config, accelerator, peers, run_dir, built, loaders))
    trainer.signals = signals
    trackers = Trackers(accelerator)
    if dry_run:
        announce(config, results, accelerator, built, loaders, trainer)
        LOGGER.info(describe_plan(config, accelerator, built, steps_per_epoch, trainer))
        return results
    if run_dir.config.is_file() and not run_dir.begun:
        LOGGER.info(f"{run_dir.path}: an earlier start left no checkpoint, so the run begins anew")
    peers.on_main(lambda: claim.begin(kept, started, built, loaders))
    claim.begun = True
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
    results |= {**summarise(trainer), "attention_backends": used.lines()}
    if accelerator.is_main_process:
        results["cost"]["latency"] = measure_latency(config, accelerator, built, trainer.bare)
        try:
            run_dir.write_results(results)
        except OSError as error:
            raise unwritable(run_dir.results, error) from error
    best, params = results["best"], built.params
    score = f"best top-1 {best['top1']:.2f}% (epoch {best['epoch']})" if best else "the best weights were lost"
    LOGGER.info(
        f"done: {score}, {params['attention']:,} attention parameters of {params['total']:,}, "
        f"{results['train_seconds']:.0f} s; results in {run_dir.path}"
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
        classes=stored_classes(run_dir.path_if_begun),
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
    stored = stored_classes(run_dir.path_if_begun)
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
    weights: Path | None,
    built: BuiltModel,
    loaders: Loaders,
    accelerator: Accelerator,
    peers: Peers,
    results: dict[str, Any],
) -> dict[str, Any]:
    """Scores of a run's weights; of the model as created (dense weights, converted) if nothing was trained."""
    for note in loaders.notes:
        LOGGER.info(note)
    which = "the model as created"
    if weights is not None:
        peers.together(lambda: verify_beside(weights))
        peers.together(lambda: load_weights(weights, built.model))
        which = str(weights)
    scores = evaluate(built.model, loaders, accelerator, peers)
    LOGGER.info(
        f"{which}: top-1 {scores.top1:.2f}%  top-5 {scores.top5:.2f}%  loss {scores.loss:.4f}  {scores.count} images"
    )
    return {**results, "evaluation": asdict(scores)}
