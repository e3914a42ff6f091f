"""Estimates the memory of a training step on a device, measured on a copy of the model with a few images, for --dry-run.

Parameters, gradients, optimizer state and EMA are exact. Activations are the highest sum of bytes alive at once in a forward and
backward pass, beyond the model and its gradients: every allocation is noted for two small batches and extrapolated by itself. Not
counted: the CUDA context, the allocator's fragmentation, workspaces of cuBLAS and NCCL, and what torch.compile saves or adds.
"""

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vit_tucker.analysis.live_bytes import LiveBytes
from vit_tucker.config.schema import TrainConfig
from vit_tucker.training.optim import create_optimizer
from vit_tucker.training.task import Task

PROBE = (2, 4)
"""Images of the two passes that are measured; batch norms need two."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes of a training step on each device.

    Attributes:
        parameters: the model's, with its buffers.
        gradients: of the trainable parameters; twice with DDP, which sends them in buckets of its own.
        optimizer: its state after the first step.
        ema: the averaged copy.
        teacher: parameters and buffers of the teacher.
        activations: highest sum of everything else in a micro-batch's forward and backward pass, its images included.
    """

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    teacher: int
    activations: int

    @property
    def total(self) -> int:
        """Returns the sum: gradients and activations are not at their highest at once, so that the peak is a little below it."""
        return sum(astuple(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_megabytes(size)}" for name, size in vars(self).items() if size)
        return f"about {_megabytes(self.total)} per device ({parts}), beside what CUDA itself takes"


def estimate_memory(
    model: nn.Module,
    config: TrainConfig,
    task: Task,
    micro_batch: int,
    precision: str = "no",
    teacher: nn.Module | None = None,
    processes: int = 1,
) -> MemoryEstimate:
    """Measures a model and a recipe; neither the model nor the random generators are changed.

    Args:
        model: patched, with weights, on the device where it is measured; activations of another device's kernels may differ.
        config: opt, model_ema and grad_checkpointing count.
        task: what it learns.
        micro_batch: images, or windows of tokens, per process and forward pass.
        precision: "no", "bf16" or "fp16".
        teacher: for distillation.
        processes: of the run; DDP if more than one.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    own = tensor_bytes([*model.parameters(), *model.buffers()])
    return MemoryEstimate(
        parameters=own,
        gradients=tensor_bytes(trainable) * (2 if processes > 1 else 1),
        optimizer=optimizer_bytes(trainable, config),
        ema=own if config.model_ema else 0,
        teacher=tensor_bytes([*teacher.parameters(), *teacher.buffers()]) if teacher is not None else 0,
        activations=activation_bytes(model, task, micro_batch, precision, config.grad_checkpointing),
    )


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of all different ``tensors`` (any shapes)."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def optimizer_bytes(parameters: Iterable[Tensor], config: TrainConfig) -> int:
    """Returns the bytes of an optimizer's state.

    It keeps state for each tensor by itself, so each shape is tried alone.

    Args:
        parameters: that it trains (any shapes).
        config: the ``train`` section.
    """
    kinds = Counter((parameter.shape, parameter.dtype) for parameter in parameters)
    return sum(
        count * _state_of_one(torch.zeros(shape, dtype=dtype), config) for (shape, dtype), count in kinds.items()
    )


def _state_of_one(value: Tensor, config: TrainConfig) -> int:
    """Returns bytes of the state for one parameter, after as many steps as the optimizer needs to have all of it."""
    holder = nn.Module()
    parameter = holder.parameter = nn.Parameter(value)
    optimizer = create_optimizer(holder, config.model_copy(update={"layer_decay": None}))
    parameter.grad = torch.full_like(parameter, 1e-3)
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):  # Kron's steps are compiled
        for _ in range(optimizer.param_groups[0].get("lookahead_k", 1)):
            optimizer.step()
    state = [x for x in tree_leaves(optimizer.state_dict()["state"]) if isinstance(x, Tensor)]
    return tensor_bytes(state)


def activation_bytes(model: nn.Module, task: Task, micro_batch: int, precision: str, checkpointed: bool) -> int:
    """Returns the highest sum of bytes beyond the model and its gradients in a training pass, extrapolated from PROBE.

    Args:
        model: is copied.
        task, micro_batch, precision: see ``estimate_memory``.
        checkpointed: recompute the blocks in the backward pass.
    """
    return own_activation_bytes(copy.deepcopy(model), task, micro_batch, precision, checkpointed)


def own_activation_bytes(model: nn.Module, task: Task, micro_batch: int, precision: str, checkpointed: bool) -> int:
    """Returns ``activation_bytes`` of a model that may be used up: its mode and its gradients change.

    Args:
        model: on its device.
        task: what it learns.
        micro_batch: images, or windows of tokens, of a forward pass.
        precision: "no", "fp16" or "bf16".
        checkpointed: with activation checkpointing.
    """
    model.train()
    if checkpointed:
        task.recompute(model)
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        few, more = (_training_pass(model, task, n, device, precision) for n in PROBE)
    factor = (micro_batch - PROBE[0]) / (PROBE[1] - PROBE[0])
    try:
        return few.extrapolate(more, factor).peak()
    except ValueError:  # a model that works differently on other batches: the line through the peaks
        return round(few.peak() + factor * (more.peak() - few.peak()))


def _training_pass(model: nn.Module, task: Task, count: int, device: torch.device, precision: str) -> LiveBytes:
    """Notes a forward and backward pass; gradients are left out, each goes as soon as it is there."""
    counter = LiveBytes([*model.parameters(), *model.buffers()])

    def drop(parameter: Tensor) -> None:
        assert parameter.grad is not None
        counter.leave_out(parameter.grad)
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(drop) for p in model.parameters() if p.requires_grad]
    loss, (inputs, labels) = task.label_loss(0.0), task.example(count)
    with counter:
        targets = labels.to(device, copy=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision != "no"):  # fp16 is as large
            logits = task.logits(model, inputs.to(device, copy=True))
        parts = (logits,) if isinstance(logits, Tensor) else logits
        torch.stack([loss(part.float(), targets) for part in parts]).sum().backward()
        del logits, parts
    for hook in hooks:
        hook.remove()
    return counter


def _megabytes(size: int) -> str:
    return f"{size / 2**30:.2f} GB" if size >= 2**30 else f"{size / 2**20:.1f} MB"
