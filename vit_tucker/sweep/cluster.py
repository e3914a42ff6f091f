"""Submits the runs of a sweep as jobs of a cluster, by submitit; each ready set of runs is one job array."""

import contextlib
import importlib.util
import io
import logging
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_tucker.config.plugins import plugin_arguments
from vit_tucker.errors import ConfigError, how_to_install
from vit_tucker.sweep.cluster_job import WARNING, ClusterJob
from vit_tucker.sweep.command import CHECKOUT
from vit_tucker.sweep.plan import Job
from vit_tucker.sweep.process import StartedRun, write_config
from vit_tucker.sweep.schema import ExecutorConfig
from vit_tucker.sweep.status import last_words

FOLDER = ".submitit"
"""Below the sweep's folder: pickles, scripts and output of the jobs; no cell has such a name."""
ACTIVE = ("PENDING", "RUNNING", "REQUEUED", "COMPLETING", "PREEMPTED", "SUSPENDED", "CONFIGURING")
CANCEL_SECONDS = 120.0
"""Time after which a cancelled job is given up, where the cluster does not report that it has ended."""
ASK_SECONDS = 2.0
LOCAL_KEYS = ("kind", "jobs", "launch")


def refuse_missing_cluster() -> None:
    """Raises ConfigError if this machine can't submit jobs, with what to install or where to go."""
    if importlib.util.find_spec("submitit") is None:
        raise ConfigError(f"executor: slurm needs submitit: {how_to_install('slurm')}")
    if missing := [name for name in ("sbatch", "srun", "sacct", "scancel") if shutil.which(name) is None]:
        raise ConfigError(
            f"executor: slurm: there is no {missing[0]} here: start the sweep on a login node of the cluster, "
            "or use --executor local"
        )


def refuse_cluster_keys(overrides: Sequence[str]) -> None:
    """Raises ConfigError if the command line has a key of the executor that means nothing on this machine."""
    for key in (override.partition("=")[0] for override in overrides):
        name = key.removeprefix("executor.").partition(".")[0]
        if key.startswith("executor.") and name in ExecutorConfig.model_fields and name not in LOCAL_KEYS:
            raise ConfigError(f"{key}: only a cluster's jobs have it: --executor slurm; here --jobs N shares the GPUs")


@dataclass
class ClusterRun(StartedRun):
    """A run as a job of a cluster.

    Attributes:
        submitted: submitit's job.
    """

    submitted: Any
    _cancelled: float | None = None
    _looked: float = 0.0

    @property
    def status(self) -> int | None:
        """Returns the exit status; 1 for a job that the cluster ended, 130 for a cancelled one; None until then."""
        result, now = self.submitted.paths.result_pickle, time.monotonic()
        force = self._cancelled is not None and now - self._looked > ASK_SECONDS
        if force:
            self._looked = now
        if not self.submitted.done(force_check=force):
            return 130 if self._cancelled is not None and now - self._cancelled > CANCEL_SECONDS else None
        if result.exists() and self.submitted.exception() is None:
            return int(self.submitted.result())
        return 1 if self._cancelled is None else 130

    @property
    def queued(self) -> bool:
        """Returns whether the job still waits for its turn."""
        info = self.submitted.watcher.get_info(self.submitted.job_id, mode="cache")
        return info.get("State") in ("PENDING", "REQUEUED")

    def describe_ending(self) -> str:
        """Returns the exit status or what the cluster reports, and the last words of the run, else of the job."""
        paths, log, start = self.submitted.paths, self.job.log, self.log_start
        how = f"status {self.status}" if paths.result_pickle.exists() else self.submitted.state
        if not log.exists() or log.stat().st_size == start:
            log, start = paths.stderr, 0
        words = last_words(log, start)
        return f"job {self.submitted.job_id}, {how}" + (f": {words}; see {log}" if words else "")

    def send(self, number: int) -> None:
        """Cancels the job, at which a run saves its state; a second time it is killed."""
        self._cancelled = self._cancelled or time.monotonic()
        with contextlib.suppress(Exception):
            self.submitted.cancel(check=number != signal.SIGKILL)


class ClusterExecutor:
    """Submits runs to a cluster.

    Args:
        config: what each run gets.
        output_dir: the sweep's folder, which all nodes see.
        cluster: slurm; submitit's "local" and "debug" try a sweep's jobs without one.
        poll_seconds: see ``Executor``.
    """

    def __init__(self, config: ExecutorConfig, output_dir: Path, cluster: str = "slurm", poll_seconds: float = 1.0):
        import submitit

        logging.getLogger("submitit").setLevel(logging.ERROR)  # it writes to standard output
        self.capacity, self.poll_seconds = sys.maxsize, poll_seconds
        self._config, self._folder = config, (output_dir / FOLDER).absolute()
        self._executor = submitit.AutoExecutor(self._folder, cluster, slurm_max_num_timeout=sys.maxsize)
        warning = WARNING.name.removeprefix("SIG")
        setup = [
            f"export SUBMITIT_PREEMPT_SIGNAL={warning}",
            f"export PYTHONPATH={shlex.quote(str(CHECKOUT))}${{PYTHONPATH:+:$PYTHONPATH}}",
            *config.setup,
        ]
        options = {"requeue": True, "signal": f"{warning}@{config.signal_seconds}", **config.slurm}
        self._executor.update_parameters(
            name=f"sweep-{output_dir.name}",
            timeout_min=config.time,
            mem_gb=config.memory,
            gpus_per_node=config.gpus,
            cpus_per_task=config.cpus,
            slurm_partition=config.partition,
            slurm_account=config.account,
            slurm_array_parallelism=config.jobs,
            slurm_additional_parameters=options,
            slurm_setup=setup,
            local_setup=setup,
        )

    def start(self, jobs: Sequence[Job]) -> list[ClusterRun | None]:
        """Submits runs as one array; a run whose job of an earlier sweep is still there is followed instead.

        Raises:
            ConfigError: the cluster refuses the jobs, or their files can't be written.
        """
        sizes = {job.key: job.log.stat().st_size if job.log.exists() else 0 for job in jobs}
        submitted = {job.key: earlier for job in jobs if (earlier := self._earlier(job)) is not None}
        new = [job for job in jobs if job.key not in submitted]
        payloads = [self._payload(job) for job in new]
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                started = self._executor.submit_array(payloads) if payloads else []
        except Exception as error:
            lines = (str(error) or errors.getvalue() or type(error).__name__).split("\n")
            raise ConfigError(f"executor: the jobs can't be submitted: {' '.join(lines[-1].split())[:300]}") from error
        for job, submission in zip(new, started, strict=True):
            submitted[job.key] = submission
            job_file(job).write_text(submission.job_id)
        return [ClusterRun(job, sizes[job.key], submitted[job.key]) for job in jobs]

    def _payload(self, job: Job) -> ClusterJob:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        arguments = ("--cfg", write_config(job), *plugin_arguments(job.config.plugins))
        launcher, gpus = self._config.launch, self._config.gpus or 1
        if launcher is None and gpus > 1:
            launcher = f"--multi_gpu --num_machines 1 --num_processes {gpus} --mixed_precision no --dynamo_backend no"
        limit = 60 * self._config.time - self._config.signal_seconds
        return ClusterJob(arguments, str(job.folder), str(job.log), launcher, limit - 60)

    def _earlier(self, job: Job) -> Any:
        """Returns the job that an earlier sweep submitted for a run, if the cluster still has it."""
        import submitit

        try:
            number = job_file(job).read_text().strip()
        except OSError:
            return None
        if self._executor.cluster != "slurm":
            return None
        found: Any = submitit.SlurmJob(self._folder, number)
        waiting = not found.paths.result_pickle.exists() and found.watcher.get_state(number, mode="force") in ACTIVE
        return found if waiting else None


def job_file(job: Job) -> Path:
    """Returns the file that keeps the number of a run's job: seed0.job beside the folder seed0."""
    return job.folder.with_suffix(".job")
