"""Training of a converted model's attention for a few steps, equal for all methods."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lm_baselines.moments import decoder_layers
from lm_baselines.text import parameters_of, token_loss
from vit_tucker.errors import DivergedError


def attention_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters of all attention modules, whatever replaced them, and those that cacheshrink's layers share."""
    shared = getattr(model, "xkv_groups", None)
    modules = [layer.self_attn for layer in decoder_layers(model)]
    return parameters_of(modules if shared is None else [*modules, shared])


def rate(step: int, steps: int, peak: float) -> float:
    """Returns the learning rate of a step: a linear warm-up over the first twentieth, then half a cosine to a tenth.

    Args:
        step: from 0.
        steps: of the whole training.
        peak: largest rate.
    """
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def heal(
    model: nn.Module,
    blocks: Tensor,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    teacher: nn.Module | None = None,
    everything: bool = False,
    bf16: bool = False,
    note: Callable[[int, float], None] | None = None,
) -> None:
    """Trains a model in place, in its own type: AdamW (no weight decay), gradients clipped to norm 1, batches by seed.

    Args:
        model: converted.
        blocks: training tokens (blocks, N); each is seen once before any is seen again.
        steps, batch_size, lr, seed: lr is the peak, see ``rate``.
        teacher: a dense model whose distribution is fitted (KL divergence) in place of the text; None for the text.
        everything: train all parameters of the model; else those of its attention.
        bf16: products of the forward and backward passes under autocast to bfloat16.
        note: called with each step and its loss.

    Raises:
        DivergedError: the loss became NaN or infinite.
    """
    model.requires_grad_(everything)
    chosen = list(model.parameters()) if everything else attention_parameters(model)
    for parameter in chosen:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(chosen, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [torch.randperm(len(blocks), generator=generator) for _ in range(steps * batch_size // len(blocks) + 1)]
    )
    model.train()
    for step in range(steps):
        batch = blocks[order[step * batch_size : (step + 1) * batch_size]]
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, lr)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=bf16):
            loss = token_loss(model, batch) if teacher is None else distance(model, teacher, batch)
        if not torch.isfinite(loss):
            raise DivergedError(f"the loss is {loss.item()} at step {step} of healing, lr {lr:g}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if note is not None:
            note(step, loss.item())
    model.eval()


def distance(model: nn.Module, teacher: nn.Module, batch: Tensor) -> Tensor:
    """Returns the mean KL divergence of a model's next token from a teacher's.

    Args:
        model, teacher: causal language models.
        batch: token ids (B, N).
    """
    with torch.no_grad():
        wanted = teacher(input_ids=batch, use_cache=False).logits.flatten(0, 1).float().log_softmax(-1)
    found = model(input_ids=batch, use_cache=False).logits.flatten(0, 1).float().log_softmax(-1)
    return nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
