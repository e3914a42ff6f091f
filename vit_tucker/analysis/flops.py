"""Operations of a whole model's forward pass, as torch's FlopCounterMode counts them: on the meta device, without arithmetic."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vit_tucker.hosts.structure import structure_copy
from vit_tucker.patching.record import patch_records, shared_records


def count_model_flops(model: nn.Module, input_size: tuple[int, ...], dtype: torch.dtype | None = None) -> int:
    """Counts floating point operations of the forward pass in eval mode, for one image or one window of tokens.

    Matrix products and convolutions count, 2 per multiply-add; norms, softmax, activations and biases do not. Attention counts
    as its two matrix products, whatever kernel the model uses. What a patched model does once per batch, folding head factors
    into cores, is done once for this one image. Only what runs is counted: a parameter that is used twice counts twice.

    Args:
        model: dense or patched, on any device; it is not touched, and no random numbers are drawn.
        input_size: (channels, height, width); of tokens their number alone.
        dtype: of the input; the parameters' own if None.

    Returns:
        Operations per image; they are those of ``PatchReport.flops_before`` and ``flops_after`` where each layer is called once
        per image. Layers that see several windows as a batch (Swin) fold their head factors once here, once per window there.
    """
    shared = shared_records(model)  # they may hold the dense layers, which no forward pass needs
    probe = structure_copy(model, shared=patch_records(model).values())
    dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        return _count(probe, torch.empty(1, *input_size, device="meta", dtype=dtype))
    except Exception:  # an operation whose result depends on values, or one that makes tensors on a device of its own
        if any(p.is_meta for p in model.parameters()):
            raise
    probe = copy.deepcopy(model, shared).cpu()
    with torch.random.fork_rng(devices=[]):
        return _count(probe, torch.zeros(1, *input_size, dtype=dtype))


def known_flops(model: nn.Module, input_size: tuple[int, ...], dtype: torch.dtype | None = None) -> int | None:
    """Returns ``count_model_flops``, or None where the forward pass of an unknown host does not run without values.

    Args:
        model, input_size, dtype: as of ``count_model_flops``.
    """
    try:
        return count_model_flops(model, input_size, dtype)
    except Exception:  # whatever it raises on the meta device: no reason not to train it
        return None


def count_cost(
    model: nn.Module, dense: nn.Module, input_size: tuple[int, ...], dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Returns the entry ``cost`` of a run's results.json before anything is measured: operations per image, see ``known_flops``.

    Args:
        model: patched, or the dense host itself.
        dense: the host before the patch; its structure is enough.
        input_size, dtype: as of ``count_model_flops``.
    """
    flops, dense_flops = (known_flops(each, input_size, dtype) for each in (model, dense))
    return {"flops": flops, "dense_flops": dense_flops, "latency": None}


def _count(model: nn.Module, images: torch.Tensor) -> int:
    model.eval().requires_grad_(False)  # the counter's module hooks fail on views of parameters otherwise
    # torch counts nothing in the CPU's fused kernel, and in others the same as in the plain matrix products
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()
