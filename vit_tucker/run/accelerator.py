"""Accelerate's part of a run: device, processes, precision, trackers."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType

from vit_tucker.config.schema import TrainConfig
from vit_tucker.errors import ConfigError
from vit_tucker.training.trackers import check_trackers


def create_accelerator(config: TrainConfig, folder: str | None = None) -> Accelerator:
    """Creates the accelerator of a run; the precision 'auto' is the launcher's, else bf16 where GPUs have it.

    Raises:
        ConfigError: a tracker that Accelerate doesn't know, or that is not installed; or fewer GPUs than processes.
    """
    cpu = config.cpu or not torch.cuda.is_available()
    if not cpu:
        refuse_missing_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count())
    precision = config.mixed_precision
    if precision == "auto":
        wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        has_bf16 = not cpu and torch.cuda.is_bf16_supported()
        precision = wanted if wanted in ("bf16", "fp16") else ("bf16" if has_bf16 else "no")  # type: ignore[assignment]
    handlers = [
        DistributedDataParallelKwargs(broadcast_buffers=False),
        InitProcessGroupKwargs(timeout=timedelta(minutes=config.timeout_minutes)),
    ]
    trackers = check_trackers(config.trackers) or None
    accelerator = Accelerator(
        cpu=cpu, mixed_precision=precision, kwargs_handlers=handlers, log_with=trackers, project_dir=folder
    )
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and accelerator.num_processes > 1 and accelerator.distributed_type != DistributedType.FSDP:
        raise ConfigError(
            "the launcher asks for FSDP, which needs GPUs; without them start the processes with --multi_gpu"
        )
    return accelerator


def refuse_missing_gpus(processes: int, gpus: int) -> None:
    """Raises ConfigError if the processes of a machine would share its GPUs, which NCCL can't do."""
    if 0 < gpus < processes:
        raise ConfigError(
            f"{processes} processes on a machine with {gpus} GPU{'s' * (gpus > 1)}: start at most {gpus} "
            f"(NUM_PROCESSES={gpus}, --num_processes {gpus}), or train on the CPU by train.cpu=true"
        )
