"""The runs of a sweep as jobs of a cluster, submitted by submitit; each ready set of runs is one job array."""

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
from vit_tucker.errors import ConfigError
from vit_tucker.sweep.cluster_job import WARNING, ClusterJob
from vit_tucker.sweep.plan import Job
from vit_tucker.sweep.process import log_file, write_config
from vit_tucker.sweep.schema import ExecutorConfig

FOLDER = ".submitit"
"""Below the sweep's folder: pickles, scripts and output of the jobs; no cell has such a name."""
ACTIVE = ("PENDING", "RUNNING", "REQUEUED", "COMPLETING", "PREEMPTED", "SUSPENDED", "CONFIGURING")
CANCEL_SECONDS = 120.0
"""After which a cancelled job is given up, where the cluster does not tell that it has ended."""
ASK_SECONDS = 2.0


def refuse_missing_cluster() -> None:
    """Raises ConfigError if this machine can't submit jobs; says what to install, or where to go."""
    if importlib.util.find_spec("submitit") is None:
        raise ConfigError("executor: slurm needs submitit: pip install 'vit_tucker[slurm]'")
    if missing := [name for name in ("sbatch", "srun") if shutil.which(name) is None]:
        raise ConfigError(
            f"executor: slurm: there is no {missing[0]} here: start the sweep on a login node of the cluster, "
            "or use --executor local"
        )


@dataclass
class ClusterRun:
    """A run as a job of a cluster; see ``StartedRun``.

    Attributes:
        job, log, said: see there.
        submitted: submitit's job.
    """

    job: Job
    log: Path
    said: int
    submitted: Any
    _cancelled: float | None = None
    _looked: float = 0.0

    @property
    def status(self) -> int | None:
        """Exit status; 1 for a job that the cluster ended, 130 for a cancelled one; None until then."""
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
        """Whether the cluster has not started it yet, as far as it was asked."""
        return self.submitted.watcher.get_info(self.submitted.job_id, mode="cache").get("State") in (
            "PENDING",
            "REQUEUED",
        )

    @property
    def ending(self) -> str:
        """How it ended: the status of its process, else what the cluster says."""
        job = f"job {self.submitted.job_id}"
        return (
            f"{job}, status {self.status}"
            if self.submitted.paths.result_pickle.exists()
            else f"{job}, {self.submitted.state}"
        )

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
        poll_seconds: between looks at the jobs.
    """

    def __init__(self, config: ExecutorConfig, output_dir: Path, cluster: str = "slurm", poll_seconds: float = 1.0):
        import submitit

        logging.getLogger("submitit").setLevel(logging.ERROR)  # it writes to standard output
        self.capacity, self.poll_seconds = sys.maxsize, poll_seconds
        self._config, self._folder = config, (output_dir / FOLDER).absolute()
        self._executor = submitit.AutoExecutor(self._folder, cluster, slurm_max_num_timeout=sys.maxsize)
        root = Path(__file__).resolve().parents[2]
        setup = [
            f"export SUBMITIT_PREEMPT_SIGNAL={WARNING.name.removeprefix('SIG')}",
            f"export PYTHONPATH={shlex.quote(str(root))}${{PYTHONPATH:+:$PYTHONPATH}}",
            *config.setup,
        ]
        options = {
            "requeue": True,
            "signal": f"{WARNING.name.removeprefix('SIG')}@{config.signal_seconds}",
            **config.slurm,
        }
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
            ConfigError: the cluster refuses the jobs.
        """
        said = {job.key: log_file(job).stat().st_size if log_file(job).exists() else 0 for job in jobs}
        submitted = {job.key: earlier for job in jobs if (earlier := self._earlier(job)) is not None}
        new = [job for job in jobs if job.key not in submitted]
        for job, started in zip(new, self._submit([self._payload(job) for job in new]), strict=True):
            submitted[job.key] = started
            job_file(job).write_text(started.job_id)
        return [ClusterRun(job, log_file(job), said[job.key], submitted[job.key]) for job in jobs]

    def _payload(self, job: Job) -> ClusterJob:
        log_file(job).parent.mkdir(parents=True, exist_ok=True)
        arguments = ("--cfg", write_config(job), *plugin_arguments(job.config.plugins))
        launcher, gpus = self._config.launch, self._config.gpus or 1
        if launcher is None and gpus > 1:
            launcher = f"--multi_gpu --num_machines 1 --num_processes {gpus} --mixed_precision no --dynamo_backend no"
        limit = 60 * self._config.time - self._config.signal_seconds
        return ClusterJob(arguments, str(job.folder), str(log_file(job)), launcher, limit - 60)

    def _submit(self, payloads: list[ClusterJob]) -> list[Any]:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                return self._executor.submit_array(payloads) if payloads else []
        except Exception as error:
            lines = (str(error) or said.getvalue() or type(error).__name__).split("\n")
            raise ConfigError(f"executor: the cluster refused the jobs: {' '.join(lines[-1].split())[:300]}") from error

    def _earlier(self, job: Job) -> Any:
        """The job that an earlier sweep submitted for a run, if the cluster still has it."""
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
    """Returns where the number of a run's job is kept: seed0.job beside the folder seed0."""
    return job.folder.with_name(f"{job.folder.name}.job")
