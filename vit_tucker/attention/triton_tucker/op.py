"""The operator: one call for torch.compile, its gradients, and what it can't do. Triton is imported when kernels first run."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Literal

import torch
from torch import Tensor

from vit_tucker.attention.gradients import register_gradients
from vit_tucker.attention.triton_tucker import tiles
from vit_tucker.attention.triton_tucker.tiles import Ranks

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_RANK = 128
MIN_CAPABILITY = (8, 0)
FORWARD = (
    "(Tensor p, Tensor k, Tensor v, Tensor pre, Tensor post, Tensor? attn_mask, Tensor? sin, Tensor? cos, "
    "float scale, bool is_causal) -> (Tensor, Tensor)"
)
BACKWARD = (
    "(Tensor dz, Tensor lse, Tensor p, Tensor k, Tensor v, Tensor pre, Tensor post, Tensor? attn_mask, Tensor? sin, "
    "Tensor? cos, float scale, bool is_causal) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
MaskKind = Literal["none", "boolean", "additive"]


def tucker_attention(
    p: Tensor,
    k: Tensor,
    v: Tensor,
    pre: Tensor,
    post: Tensor,
    *,
    scale: float,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    angles: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Computes sum_i softmax(scale P T_i K^T + mask) V S_i^T (arXiv 2603.30033, Eqs 2-6), without heads' queries in memory.

    A row in which everything is masked gives zeros and passes no gradient on, as scaled_dot_product_attention does in recent
    versions of torch. Rows whose additive mask is the lowest finite float32 everywhere count as such.

    Args:
        p: tokens in the query basis, X U2 (and its bias), (B, N, r2).
        k: the one latent key of all heads, X U3, (B, N, r3); with ``angles`` already rotated.
        v: the one latent value of all heads, X U3t, (B, N, r3t).
        pre: slices T_i = (C x1 U1)_i, (H, r2, r3).
        post: slices S_i = (Ct x1 U1t)_i, (H, r2t, r3t).
        scale: factor on the scores.
        attn_mask: boolean (True: attend) or additive, broadcasts to (B, H, N, N); it gets no gradient.
        is_causal: attend to earlier tokens and the token itself; takes precedence over the mask.
        angles: sin and cos of each latent pair (2 p, 2 p + 1), (N, r3/2) or (B, N, r3/2), 0 and 1 for prefix tokens. The
            queries are rotated by them. They get no gradient.

    Returns:
        z, (B, N, r2t), to be multiplied by U2t^T.

    Raises:
        ValueError: for what the kernels can't do, see ``unsupported``, or shapes that don't fit.
    """
    kind: MaskKind = (
        "none" if attn_mask is None or is_causal else "boolean" if attn_mask.dtype == torch.bool else "additive"
    )
    wrong = _wrong_shapes(p, k, v, pre, post, attn_mask, angles) or unsupported(
        p.dtype,
        Ranks(pre.shape[1], pre.shape[2], post.shape[1], post.shape[2]),
        mask=kind,
        mask_requires_grad=attn_mask is not None and not is_causal and attn_mask.requires_grad,
        rope=angles is not None,
        angles_require_grad=angles is not None and (angles[0].requires_grad or angles[1].requires_grad),
    )
    if wrong:
        raise ValueError(f"tucker_attention: {wrong}")
    sin, cos = (None, None) if angles is None else angles
    mask = None if is_causal else attn_mask
    return forward_op(p, k, v, pre, post, mask, sin, cos, float(scale), is_causal)[0]


def unsupported(
    dtype: torch.dtype,
    ranks: Ranks,
    *,
    mask: MaskKind = "none",
    mask_requires_grad: bool = False,
    dropout: float = 0.0,
    rope: bool = False,
    angles_require_grad: bool = False,
    shared_memory: int | None = None,
) -> str | None:
    """Returns why a call can't be taken, or None if it can; from static facts alone.

    Args:
        dtype: of p, k, v and the cores.
        ranks: r2, r3, r2t, r3t.
        mask: kind of the mask.
        mask_requires_grad, angles_require_grad: whether those want gradients (as a learned position bias does).
        dropout: of the attention weights.
        rope: whether queries are rotated.
        shared_memory: bytes that a block of the device has, or None to leave that out.
    """
    if dtype not in DTYPES:
        return f"the dtype must be float16, bfloat16 or float32, not {dtype}"
    if not all(1 <= rank <= MAX_RANK for rank in ranks):
        return f"ranks go from 1 to {MAX_RANK}, not {tuple(ranks)}"
    if rope and ranks[1] % 2:
        return f"with RoPE the key rank is even, not {ranks[1]}"
    if mask != "none" and mask_requires_grad:
        return "the mask gets no gradient here, but requires one"
    if rope and angles_require_grad:
        return "the angles get no gradient here, but require one"
    if dropout:
        return "there is no dropout of attention weights here"
    if shared_memory is not None:
        for kernel in tiles.KERNELS:
            if tiles.choose(kernel, ranks, dtype.itemsize, rope, mask != "none", shared_memory) is None:
                return f"no tile of the {kernel} kernel for the ranks {tuple(ranks)} fits {shared_memory} bytes of shared memory"
    return None


def available(device: torch.device) -> str | None:
    """Returns why the kernels can't run on a device, or None if they can: CUDA from sm_80 on, or Triton's interpreter.

    For sm_90 the compiler of Triton 3.2 ends the whole process over the forward kernel of ranks above 64.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on"):
        from vit_tucker.attention.triton_tucker.inputs import interpreted

        if interpreted():
            return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels run on CUDA devices, not on {device.type if torch.version.hip is None else 'ROCm'}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    if capability >= (9, 0):
        import triton

        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
            return "compute capability 9.0 and above needs Triton 3.3 or later"
    return None


def _wrong_shapes(
    p: Tensor,
    k: Tensor,
    v: Tensor,
    pre: Tensor,
    post: Tensor,
    attn_mask: Tensor | None,
    angles: tuple[Tensor, Tensor] | None,
) -> str | None:
    """Returns what doesn't fit together, or None."""
    if (p.ndim, k.ndim, v.ndim, pre.ndim, post.ndim) != (3,) * 5:
        return "p, k, v, pre and post have three dimensions each"
    B, N = p.shape[:2]
    H, r2, r3 = pre.shape
    wanted = {
        "p": (p, (B, N, r2)),
        "k": (k, (B, N, r3)),
        "v": (v, (B, N, post.shape[2])),
        "post": (post, (H, *post.shape[1:])),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != tuple(shape):
            return f"{name} must be {tuple(shape)}, not {tuple(tensor.shape)}"
    for name, tensor in (("k", k), ("v", v), ("pre", pre), ("post", post)):
        if tensor.dtype != p.dtype or tensor.device != p.device:
            return f"{name} is {tensor.dtype} on {tensor.device}, p is {p.dtype} on {p.device}"
    if attn_mask is not None:
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            return f"a mask is boolean or additive, not {attn_mask.dtype}"
        sizes = zip(reversed(attn_mask.shape), (N, N, H, B), strict=False)
        if attn_mask.ndim > 4 or any(size not in (1, whole) for size, whole in sizes):
            return f"the mask {tuple(attn_mask.shape)} doesn't broadcast to {(B, H, N, N)}"
    if angles is not None:
        sin, cos = (tuple(angle.shape) for angle in angles)
        if sin != cos or sin not in ((N, r3 // 2), (B, N, r3 // 2)):
            return f"sines and cosines are {(N, r3 // 2)} or {(B, N, r3 // 2)}, not {sin} and {cos}"
    return None


@torch.library.custom_op("vit_tucker::triton_tucker_attention", mutates_args=(), schema=FORWARD)
def forward_op(p: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Computes z (B, N, r2t) and the log-sum-exp in base 2, (B, H, N) float32, which gets no gradient."""
    launch = _kernels(p.device)
    with torch.cuda.device_of(p):
        return launch.forward(launch.Inputs.of(p, *rest))


@torch.library.custom_op("vit_tucker::triton_tucker_attention_backward", mutates_args=(), schema=BACKWARD)
def backward_op(dz: Tensor, lse: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradients of p, k, v, pre and post.

    Args:
        dz: (B, N, r2t) gradient of the outputs.
        lse: (B, H, N), as ``forward_op`` returned it.
        *inputs: the arguments of ``forward_op``.
    """
    launch = _kernels(dz.device)
    with torch.cuda.device_of(dz):
        return launch.backward(dz, launch.Inputs.of(*inputs), lse)


def _kernels(device: torch.device) -> Any:
    """Returns the module that launches the kernels."""
    if reason := available(device):
        raise RuntimeError(f"tucker_attention: {reason}")
    from vit_tucker.attention.triton_tucker import launch

    return launch


@forward_op.register_fake
def _forward_shapes(p: Tensor, k: Tensor, v: Tensor, pre: Tensor, post: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, N, _ = p.shape
    return p.new_empty(B, N, post.shape[1]), p.new_empty(B, pre.shape[0], N, dtype=torch.float32)


@backward_op.register_fake
def _backward_shapes(dz: Tensor, lse: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:5])


def _no_second(ctx: Any, *gradients: Any) -> None:
    raise NotImplementedError("tucker_attention has no second derivative: use the layer's path in plain torch for that")


register_gradients(forward_op, backward_op, tensors=8, options=2)
backward_op.register_autograd(_no_second)
